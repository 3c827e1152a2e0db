"use strict";
/* What a person decides: pick, reject, redo, a note. It is kept in this browser under the run's key, one entry for each
   clip, and leaves as picks.json (docs/morning.md); a page that is served sends it into the run folder as well. */

(() => {
  const DECISIONS = ["pick", "reject", "redo"], JUDGED = ["decision", "note"];
  const own = new Map();                // key -> entry, made in this browser
  const stored = new Map();             // key -> decision that the run folder has
  let known = null;                     // keys of the rows that count and can be judged, when all are here
  const past = [];                      // [key, entry or undefined], the last change at the end
  const listeners = [];
  let unsent = new Map();               // key -> entry, of a page that is served
  let sending = null;
  let full = false;

  const prefix = () => `dailies:${dailies.said.key}:`;
  const keyOf = row => JSON.stringify([row.id, String(row.seed), row.clip_id]);
  const served = document.documentElement.dataset.served === "yes";

  function open() {
    const start = prefix();
    try { localStorage.length; } catch {
      if (!served) dailies.tell("This browser keeps nothing of a page: download the picks before you close it.");
      return;
    }
    for (let place = 0; place < localStorage.length; place += 1) {
      const name = localStorage.key(place);
      if (!name.startsWith(start)) continue;
      try {
        const entry = JSON.parse(localStorage.getItem(name));
        if (!entry || typeof entry.note !== "string") continue;
        own.set(name.slice(start.length), entry);
        if (served && !entry.sent) send(name.slice(start.length), entry);       // the page was closed before it could
      } catch { /* of another program */ }
    }
  }

  /* What the run folder has is counted too, and what was decided here about a clip that another take replaced is not;
     who has nothing here or there fetches nothing. */
  async function openStored() {
    const { files, const: same } = dailies.columns.get("decided_at") || {};
    if (!files && !same && !own.size) return;
    const rows = (await dailies.allPages()).flat().filter(row => row.current && takes(row));
    known = new Set(rows.map(keyOf));
    for (const row of rows) {
      if (!row.decided_at) continue;
      if (!isOwn(row)) store(keyOf(row), undefined);    // it would never count again
      if (row.decision) stored.set(keyOf(row), row.decision);
    }
    listeners.forEach(listener => listener(null));
  }

  /* What holds for a row: what was decided here, or what the run folder has, if that came later. */
  function of(row) {
    return isOwn(row) ? own.get(keyOf(row)) : { decision: row.decision || null, note: row.note || "" };
  }

  const CLOCK_S = 0.1;                  // to which the report says when something was decided

  function isOwn(row) {
    const mine = own.get(keyOf(row));
    return Boolean(mine) && !(row.decided_at > Date.parse(mine.at) / 1000 + CLOCK_S);
  }

  /* A column as it is now: of a decision and a note, what was decided here stands above what the run folder has. */
  async function column(name) {
    if (!JUDGED.includes(name)) return dailies.column(name);
    return (await dailies.allPages()).flat().map(row => of(row)[name] || null);
  }

  /* A row that can be judged: one of this run, that is done. */
  const takes = row => row && !row.run && row.status === "done" && row.clip_id && (row.seed ?? null) !== null;

  function store(key, entry) {
    if (entry) own.set(key, entry); else own.delete(key);
    try {
      if (entry) localStorage.setItem(prefix() + key, JSON.stringify(entry));
      else localStorage.removeItem(prefix() + key);
      full = false;
    } catch {
      if (!full) dailies.tell("This browser keeps no more. Download the picks now: they are in this page alone.");
      full = true;
    }
  }

  function set(row, change) {
    const key = keyOf(row);
    past.push([key, own.get(key), row]);
    const { decision, note } = { ...of(row), ...change };
    const entry = { decision, note, at: new Date().toISOString() };
    store(key, entry);
    send(key, entry);
    listeners.forEach(listener => listener(row));
  }

  /* The same key again takes a decision back. */
  function decide(row, decision) {
    set(row, { decision: of(row).decision === decision ? null : decision });
    return of(row).decision;
  }

  /* Half a character, which a cut at the note's end may leave, is none that a file could hold. */
  function note(row, text) {
    const whole = text.toWellFormed ? text.toWellFormed() : text;
    if (of(row).note !== whole) set(row, { note: whole });
  }

  /* Takes the last change back; the row that it was of, or null. */
  function undo() {
    const last = past.pop();
    if (!last) return null;
    const [key, before, row] = last;
    store(key, before);
    send(key, { ...(before || of(row)), at: new Date().toISOString() });
    listeners.forEach(listener => listener(row));
    return row;
  }

  // The file.

  /* A seed can be larger than JavaScript's whole numbers, and is written digit by digit. */
  function lineOf(key, entry) {
    const [id, seed, clip] = JSON.parse(key);
    const rest = { clip_id: clip, decision: entry.decision, note: entry.note, decided_at: entry.at };
    return `{"id":${JSON.stringify(id)},"seed":${BigInt(seed)},${JSON.stringify(rest).slice(1)}`;
  }

  const fileOf = entries =>
    `{"format":1,"picks":[\n${[...entries].map(([key, entry]) => lineOf(key, entry)).join(",\n")}\n]}\n`;

  function download() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([fileOf(own)], { type: "application/json" }));
    link.download = "picks.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  // A page that is served.

  const SEND_AFTER_MS = 2000;           // several decisions are one file in the run folder

  function send(key, entry) {
    if (!served) return;
    unsent.set(key, { ...entry, note: entry.note || "", decision: entry.decision || null });
    if (!sending) sending = setTimeout(flush, SEND_AFTER_MS);
    dailies.state && dailies.state("saving");
  }

  async function flush() {
    const batch = unsent;
    unsent = new Map();
    sending = null;
    try {
      const answer = await fetch("picks", { method: "POST", body: fileOf(batch), keepalive: batch.size < 100,
        headers: { "Content-Type": "application/json" } });
      if (!answer.ok) throw new Error((await answer.text()).slice(0, 300) || `answer ${answer.status}`);
      for (const [key, entry] of batch) if (own.get(key) && own.get(key).at === entry.at) store(key, { ...own.get(key), sent: true });
      dailies.state && dailies.state(unsent.size ? "saving" : "saved");
    } catch (error) {
      for (const [key, entry] of batch) if (!unsent.has(key)) unsent.set(key, entry);
      sending = setTimeout(flush, 5000);
      dailies.state && dailies.state("not saved", error.message);
    }
  }

  addEventListener("pagehide", () => { if (unsent.size) flush(); });

  /* How many of each there are, of this browser and of the run folder together. */
  function counts() {
    const found = { pick: 0, reject: 0, redo: 0 };
    for (const [key, entry] of own) if (entry.decision && (!known || known.has(key))) found[entry.decision] += 1;
    for (const [key, decision] of stored) if (!own.has(key)) found[decision] += 1;
    return found;
  }

  dailies.decisions = { DECISIONS, JUDGED, open, openStored, of, isOwn, column, takes, decide, note, undo, download,
    counts, served, size: () => own.size, onChange: listener => listeners.push(listener) };
})();
