"use strict";
/* Begins the page, and answers keys. */

(() => {
  const one = name => document.getElementById(name);
  const KEYS = [
    ["← ↑ ↓ →", "from clip to clip; J and K too"], ["Enter", "look at a clip"], ["Space", "play, with sound; again to pause"],
    ["P", "pick"], ["X", "reject"], ["R", "redo: to be made again with another seed"], ["N", "write a note"],
    ["U", "undo the last decision"], ["S", "all clips of the prompt side by side"], ["G", "group by prompt"],
    ["M", "mute"], ["/", "search"], ["D", "download the picks"], ["Esc", "back"],
  ];

  /* A sentence that goes by itself. */
  dailies.tell = text => {
    const toast = one("toast");
    toast.textContent = one("said").textContent = text;
    toast.hidden = false;
    clearTimeout(dailies.tell.timer);
    dailies.tell.timer = setTimeout(() => { toast.hidden = true; }, 4000);
  };

  dailies.fail = error => {
    const text = String(error && error.message || error);
    const uri = dailies.said ? dailies.night.quoted(dailies.said.uri) : "URI";
    dailies.tell(`${text}. Make the report again: dailies report ${uri}`);
  };

  dailies.show = name => {
    for (const view of ["clips", "night"]) {
      one(`view-${view}`).hidden = view !== name;
      one(`tab-${view}`).setAttribute("aria-selected", view === name);
      one(`tab-${view}`).tabIndex = view === name ? 0 : -1;
    }
    if (name === "night") dailies.night.show(); else dailies.sheet.draw();
    scrollTo(0, 0);
  };

  // Decisions.

  const WORDS = { pick: "Picked", reject: "Rejected", redo: "To redo" };

  /* The row that keys are about. */
  function subject() {
    return dailies.viewer.isOpen ? dailies.viewer.row : dailies.here(dailies.query.view[dailies.sheet.cursor]);
  }

  function decide(decision) {
    const row = subject();
    if (!row) return;
    if (!dailies.decisions.takes(row)) {
      dailies.tell(row.run ? `This clip is of ${dailies.said.runs[row.run].name}: judge it in that run's own report.`
        : "This row has no clip to judge.");
      return;
    }
    const now = dailies.decisions.decide(row, decision);
    one("said").textContent = now ? WORDS[now] : "No decision";
    if (!now) return;
    if (now === "pick" && !row.current) {
      dailies.tell("This is an earlier take. When the run folder has the picks, it counts again with: "
        + `dailies redo ${dailies.night.quoted(dailies.said.uri)} --revert`);
    }
    if (dailies.viewer.isOpen) dailies.viewer.step(1);
    else dailies.sheet.move(dailies.sheet.cursor + 1);
  }

  async function undo() {
    const row = dailies.decisions.undo();
    if (!row) { dailies.tell("Nothing to undo."); return; }
    const place = dailies.query.view.indexOf(row.index);
    one("said").textContent = "Undone";
    if (place < 0) return;
    if (dailies.viewer.isOpen) dailies.viewer.go(place); else dailies.sheet.move(place);
  }

  function judged() {
    const found = dailies.decisions.counts(), total = Math.max(1, dailies.said.figures.done);
    const sum = found.pick + found.reject + found.redo;
    for (const name of dailies.decisions.DECISIONS) {
      document.querySelector(`.meter .${name}`).style.width = `${found[name] / total * 100}%`;
    }
    one("judged-text").textContent = sum ? `${found.pick.toLocaleString()} picked, ${found.reject.toLocaleString()} rejected, ${
      found.redo.toLocaleString()} to redo` : "Nothing judged yet";
    if (!dailies.decisions.served) one("save").disabled = !dailies.decisions.size();
  }

  /* Of a page that is served: whether the run folder has the decisions. */
  dailies.state = (state, why) => {
    one("save").textContent = { saving: "Saving…", saved: "Saved", "not saved": "Not saved" }[state];
    one("save").classList.toggle("wrong", state === "not saved");
    if (why) dailies.tell(`The decisions are kept in this browser, but not in the run folder yet: ${why}`);
  };

  // Keys.

  const MOVES = { ArrowLeft: -1, ArrowRight: 1, k: -1, j: 1 };

  function inViewer(key) {
    const { viewer } = dailies;
    if (key in MOVES) viewer.step(MOVES[key]);
    else if (key === "ArrowDown" || key === "ArrowUp") viewer.go(viewer.position + (key === "ArrowDown" ? 1 : -1));
    else if (key === " ") viewer.toggle();
    else if (key === "Escape" || key === "Enter") viewer.close();
    else if (key === "n") viewer.focusNote();
    else return false;
    return true;
  }

  function inSheet(key) {
    const { sheet } = dailies;
    const far = sheet.columns * 4;
    const to = { Home: 0, End: dailies.query.view.length - 1, PageDown: sheet.cursor + far, PageUp: sheet.cursor - far };
    if (key in MOVES) sheet.move(sheet.focused ? sheet.cursor + MOVES[key] : sheet.cursor);
    else if (key === "ArrowDown" || key === "ArrowUp") {
      if (sheet.focused) sheet.line(key === "ArrowDown" ? 1 : -1); else sheet.move(sheet.cursor);
    } else if (key in to) sheet.move(to[key]);
    else if (key === "Enter") dailies.viewer.open(sheet.cursor);
    else if (key === " ") dailies.viewer.open(sheet.cursor, { play: true });
    else if (key === "n") { dailies.viewer.open(sheet.cursor); dailies.viewer.focusNote(); }
    else return false;
    return true;
  }

  const EVERYWHERE = {
    p: () => decide("pick"), x: () => decide("reject"), r: () => decide("redo"), u: undo,
    s: () => dailies.viewer.toggleSide(), m: () => dailies.viewer.toggleSound(), g: () => dailies.controls.group(),
    d: () => dailies.decisions.size() && dailies.decisions.download(),
    "/": () => { dailies.viewer.close(); dailies.show("clips"); one("search").focus(); }, "?": () => one("keys").showModal(),
  };

  addEventListener("keydown", event => {
    const target = event.target;
    if (event.isComposing || one("keys").open) return;
    if (/^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName)) {
      if (event.key === "Escape") { event.preventDefault(); target.blur(); if (dailies.viewer.isOpen) one("stage").focus(); }
      return;
    }
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if ((event.ctrlKey || event.metaKey) && key === "z") { event.preventDefault(); undo(); return; }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if ((key === " " || key === "Enter") && target.closest("button, a, summary")) return;
    if (target.closest("[role=tablist]") && (key === "ArrowLeft" || key === "ArrowRight")) {
      const other = target.id === "tab-clips" ? "night" : "clips";
      dailies.show(other);
      one(`tab-${other}`).focus();
      return;
    }
    const clips = !one("view-clips").hidden;
    if (!clips && key !== "?" && key !== "/") return;
    if (key in EVERYWHERE) { event.preventDefault(); EVERYWHERE[key](); return; }
    if (dailies.viewer.isOpen ? inViewer(key) : inSheet(key)) event.preventDefault();
  });

  /* Tab stays within an open viewer. */
  addEventListener("keydown", event => {
    if (event.key !== "Tab" || !dailies.viewer.isOpen) return;
    const stops = [...one("viewer").querySelectorAll("button, textarea")].filter(each => !each.disabled);
    const at = stops.indexOf(document.activeElement);
    event.preventDefault();
    stops[(at + (event.shiftKey ? -1 : 1) + stops.length) % stops.length].focus();
  });

  // The rest of the page.

  function theme(name) {
    if (name) document.documentElement.dataset.theme = name; else delete document.documentElement.dataset.theme;
    try { localStorage.setItem("dailies:theme", name || ""); } catch { /* kept by nobody */ }
  }

  function isDark() {
    const { theme: said } = document.documentElement.dataset;
    return said ? said === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }

  function wire() {
    for (const view of ["clips", "night"]) one(`tab-${view}`).onclick = () => dailies.show(view);
    for (const button of document.querySelectorAll(".decide [data-decision]")) {
      button.onclick = () => decide(button.dataset.decision);
    }
    one("undo").onclick = undo;
    one("save").onclick = () => dailies.decisions.download();
    if (dailies.decisions.served) one("save").textContent = "Saved";
    one("theme").onclick = () => theme(isDark() ? "light" : "dark");
    one("help").onclick = () => one("keys").showModal();
    one("keys").querySelector("button").onclick = () => one("keys").close();
    one("keys").querySelector("dl").replaceChildren(...KEYS.flatMap(([key, text]) => {
      const term = document.createElement("dt"), what = document.createElement("dd");
      term.append(...key.split(" ").map(each => Object.assign(document.createElement("kbd"), { textContent: each })));
      what.textContent = text;
      return [term, what];
    }));
    dailies.decisions.onChange(row => {
      judged();
      if (row) { dailies.sheet.refresh(row); dailies.viewer.refresh(row); }
    });
  }

  async function begin() {
    try { theme(localStorage.getItem("dailies:theme")); } catch { /* a browser that keeps nothing */ }
    await dailies.open();
    document.title = `${dailies.said.name} · dailies`;
    one("run-name").textContent = dailies.said.name;
    const { figures } = dailies.said;
    one("run-state").textContent = dailies.said.finished ? "finished" : figures.pending ? "under way" : "";
    dailies.decisions.open();
    dailies.night.figures();
    dailies.controls.open();
    wire();
    judged();
    if (dailies.rows) await dailies.page(0);
    await dailies.controls.again();
    document.body.classList.add("begun");
    dailies.begunAt = performance.now();
    const { links_end_at: end } = dailies.said;
    if (end && end * 1000 < Date.now()) {
      one("run-state").textContent = "links have ended";
      dailies.tell(`The links to clips ended on ${dailies.night.day(end)}. Make the report again, with --presign.`);
    }
    dailies.decisions.openStored().catch(dailies.fail);
  }

  begin().catch(error => {
    document.body.classList.add("begun");
    const empty = one("empty");
    empty.hidden = false;
    empty.querySelector("strong").textContent = "The report cannot be read";
    empty.querySelector("p").textContent = String(error.message || error);
    empty.querySelector("button").hidden = true;
  });
})();
