"use strict";
/* One clip, or those of one prompt side by side. The next poster is here before it is asked for; the clip itself is
   fetched when it is played, or when one stays on it. */

(() => {
  const REST_MS = 160, AHEAD = 6;
  const one = name => document.getElementById(name);
  const viewer = one("viewer"), stage = one("stage"), panel = { prompt: one("prompt"), details: one("details") };
  let at = 0;                           // position in the view
  let row = null;
  let side = false, justAsked = false;  // side by side, since this very key
  let shots = [];                       // {row, element, video}: what is on the stage
  let chosen = 0;                       // of them
  let playing = false, muted = false, rest = null, shownAt = 0, before = null;

  const isOpen = () => !viewer.hidden;

  function open(position, { play = false } = {}) {
    if (!isOpen()) before = document.activeElement;
    viewer.hidden = false;
    document.body.classList.add("looking");
    playing = play;
    go(position);
    stage.focus();
  }

  function close() {
    if (!isOpen()) return;
    keepNote();
    clear();
    viewer.hidden = true;
    document.body.classList.remove("looking");
    dailies.sheet.move(at);
    if (!dailies.sheet.focused && before) before.focus();
  }

  function go(position) {
    const view = dailies.query.view;
    if (!view.length) return;
    keepNote();
    at = Math.min(view.length - 1, Math.max(0, position));
    const mine = at;
    const asked = performance.now();
    dailies.sheet.fill(view[at], found => {
      if (mine !== at || !isOpen()) return;
      row = found;
      shownAt = asked;
      if (side) abreast().catch(dailies.fail); else alone();
      about();
      for (let ahead = 1; ahead <= AHEAD; ahead += 1) {
        if (at + ahead < view.length) dailies.sheet.fill(view[at + ahead], dailies.picture.fetchAhead);
      }
    });
  }

  function clear() {
    clearTimeout(rest);
    for (const shot of shots) {
      dailies.picture.stop(shot.picture);
      if (shot.video) { shot.video.pause(); shot.video.removeAttribute("src"); shot.video.load(); }
    }
    shots = [];
  }

  function alone() {
    clear();
    chosen = 0;
    shots = [shotOf(row)];
    stage.classList.remove("abreast");
    stage.replaceChildren(shots[0].element);
    settle();
  }

  async function abreast() {
    const mine = row;
    const found = await dailies.query.sameprompt(row);
    const rows = await Promise.all(found.map(dailies.row));
    if (row !== mine || !side) return;
    clear();
    shots = rows.map(shotOf);
    chosen = Math.max(0, found.indexOf(row.index));
    stage.classList.add("abreast");
    stage.replaceChildren(...shots.map(shot => shot.element));
    if (shots.length === 1 && justAsked) dailies.tell("This is the only clip of its prompt.");
    justAsked = false;
    mark();
    settle();
  }

  function shotOf(of) {
    const element = document.createElement("figure");
    element.className = "shot";
    const frame = document.createElement("div");
    frame.className = "frame";
    const picture = dailies.picture.element(of);
    // a small clip is enlarged, but not to a blur that fills the window
    for (const [side, name] of [["maxWidth", "width"], ["maxHeight", "height"]]) {
      if (of.width && of.height) frame.style[side] = `${Math.max(2, 560 / Math.max(of.width, of.height)) * of[name]}px`;
    }
    frame.append(picture);
    element.append(frame);
    const caption = document.createElement("figcaption");
    caption.textContent = `${dailies.said.runs[of.run || 0].name === dailies.said.name || !of.run ? "" :
      `${dailies.said.runs[of.run].name} · `}${of.id} · seed ${of.seed}${of.current ? "" : " · earlier take"}${
      of.selected ? " · ★ selected" : ""}`;
    element.append(caption);
    const shot = { row: of, element, frame, picture, video: null };
    element.addEventListener("click", () => choose(shots.indexOf(shot), true));
    decided(shot);
    if (of.status === "failed") told(shot).catch(dailies.fail);
    return shot;
  }

  async function told(shot) {
    const [types, errors] = await Promise.all([dailies.column("error_type"), dailies.column("error")]);
    const text = document.createElement("p");
    text.className = "error";
    text.textContent = `${types[shot.row.index] || "Failed"}: ${errors[shot.row.index] || ""}`;
    shot.frame.replaceChildren(text);
  }

  const decided = shot => { shot.element.dataset.decision = dailies.decisions.of(shot.row).decision || ""; };

  /* Whoever stays on a clip is likely to play it: it is fetched then, not for those that are passed over. */
  function settle() {
    if (playing) shots.forEach(film);
    else rest = setTimeout(() => { if (!side) shots.forEach(film); }, REST_MS);
  }

  function film(shot) {
    if (shot.video || !shot.row.clip) return;
    const video = document.createElement("video");
    Object.assign(video, { src: shot.row.clip, loop: true, playsInline: true, preload: "auto", controls: false });
    video.muted = muted || shots.indexOf(shot) !== chosen;
    video.setAttribute("aria-label", "The clip");
    video.tabIndex = -1;
    video.addEventListener("loadeddata", () => video.classList.add("ready"), { once: true });
    video.addEventListener("error", () => {
      if (!video.getAttribute("src")) return;
      video.remove();
      shot.element.dataset.problem = "This clip cannot be played from here.";
    });
    shot.video = video;
    shot.frame.append(video);
    if (playing) start(video);
  }

  const start = video => video.play().catch(() => { /* gone already, or the browser waits for a key */ });

  function toggle() {
    playing = !playing;
    if (playing) shots.forEach(film);
    for (const { video } of shots) {
      if (!video) continue;
      if (playing) { if (side) video.currentTime = 0; start(video); } else video.pause();
    }
  }

  function choose(number, byHand) {
    if (!shots[number]) return;
    if (!side) { if (byHand) toggle(); return; }
    keepNote();
    chosen = number;
    row = shots[chosen].row;
    const place = dailies.query.view.indexOf(row.index);
    if (place >= 0) at = place;
    for (const [each, shot] of shots.entries()) if (shot.video) shot.video.muted = muted || each !== chosen;
    mark();
    about();
  }

  function mark() {
    for (const [number, shot] of shots.entries()) shot.element.setAttribute("aria-current", number === chosen);
    if (shots[chosen]) shots[chosen].element.scrollIntoView({ block: "nearest" });
  }

  /* The panel: the prompt, what was decided, and all that the ledger says. */
  function about() {
    one("place").textContent = `${(at + 1).toLocaleString()} of ${dailies.query.view.length.toLocaleString()}`;
    panel.prompt.textContent = row.prompt || "No prompt";
    const can = dailies.decisions.takes(row);
    for (const button of viewer.querySelectorAll("[data-decision]")) if (button.tagName === "BUTTON") {
      button.disabled = !can;
      button.setAttribute("aria-pressed", dailies.decisions.of(row).decision === button.dataset.decision);
    }
    const note = one("note");
    note.disabled = !can;
    if (document.activeElement !== note) note.value = dailies.decisions.of(row).note;
    clearTimeout(about.later);
    about.later = setTimeout(() => details().catch(dailies.fail), shownAt && performance.now() - shownAt < 400 ? 120 : 0);
  }

  /* The columns are fetched when somebody stays, not for each clip that is passed. */
  async function details() {
    const mine = row;
    const above = ["prompt", ...dailies.decisions.JUDGED];
    if (dailies.decisions.isOwn(row)) above.push("decided_at", "decided_by");       // of a decision that is none any more
    const names = [...dailies.columns.keys()].filter(name => !dailies.HIDDEN.has(name) && !above.includes(name));
    const values = await Promise.all(names.map(name => dailies.column(name)));
    if (row !== mine || !isOpen()) return;
    const groups = new Map(dailies.GROUPS.map(title => [title, document.createElement("dl")]));
    names.forEach((name, place) => {
      const value = values[place][row.index];
      if (value === null || value === undefined || value === "") return;
      const term = document.createElement("dt"), text = document.createElement("dd");
      term.textContent = dailies.label(name);
      text.textContent = dailies.words(name, value);
      if (typeof value === "string") text.title = value;                // a hash is cut
      groups.get(dailies.groupOf(name)).append(term, text);
    });
    panel.details.replaceChildren(...[...groups].filter(([, list]) => list.children.length).flatMap(([title, list]) => {
      const heading = document.createElement("h3");
      heading.textContent = title;
      return [heading, list];
    }));
  }

  function keepNote() {
    const note = one("note");
    if (row && isOpen() && !note.disabled) dailies.decisions.note(row, note.value.trim());
  }

  /* A decision goes on to the next clip, as somebody does who has many before them. */
  function step(by) {
    if (side && shots.length > 1 && chosen + by >= 0 && chosen + by < shots.length) return choose(chosen + by);
    if (!side) return go(at + by);
    const view = dailies.query.view;
    const members = new Set(shots.map(shot => shot.row.index));
    let next = at;
    while (next >= 0 && next < view.length && members.has(view[next])) next += by;
    if (next >= 0 && next < view.length) go(next);
  }

  function refresh(changed) {
    for (const shot of shots) if (shot.row.index === changed.index) decided(shot);
    if (isOpen() && row && row.index === changed.index) about();
  }

  function toggleSide() {
    if (!isOpen()) open(dailies.sheet.cursor);
    side = justAsked = !side;
    one("beside").setAttribute("aria-pressed", side);
    go(at);
  }

  function toggleSound() {
    muted = !muted;
    one("sound").setAttribute("aria-pressed", muted);
    for (const [number, shot] of shots.entries()) if (shot.video) shot.video.muted = muted || number !== chosen;
  }

  one("close").onclick = close;
  one("beside").onclick = toggleSide;
  one("sound").onclick = toggleSound;
  one("note").addEventListener("blur", keepNote);
  stage.tabIndex = -1;

  /* A finger moves on by a swipe. */
  let from = null;
  stage.addEventListener("touchstart", event => { from = event.touches[0]; }, { passive: true });
  stage.addEventListener("touchend", event => {
    const to = event.changedTouches[0];
    if (!from || Math.abs(to.clientX - from.clientX) < 50) return;
    step(to.clientX < from.clientX ? 1 : -1);
  }, { passive: true });

  dailies.viewer = { open, close, go, step, toggle, toggleSide, toggleSound, refresh,
    focusNote: () => one("note").focus(), get isOpen() { return isOpen(); }, get row() { return row; },
    get position() { return at; } };
})();
