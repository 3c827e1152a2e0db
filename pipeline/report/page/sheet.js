"use strict";
/* The contact sheet: as many tiles as the window shows, whatever the night's size. Lines of tiles have their places
   counted out beforehand; scrolling makes those that come into sight and drops those that leave it. */

(() => {
  const GAP = 16, CAPTION = { prompts: 64, ids: 48 }, HEADING = 44, AHEAD = 600;
  const sheet = document.getElementById("clips");
  const tiles = new Map();              // position in the view -> element
  const headings = new Map();           // line -> element
  const QUIET = matchMedia("(prefers-reduced-motion: reduce)");
  let lines = [];                       // {top, first, count, heading}
  let columns = 1, width = 200, height = 200, cursor = 0, due = false, laidOut = 0;

  const view = () => dailies.query.view;

  /* Where everything lies. */
  async function layout() {
    const room = laidOut = sheet.clientWidth;
    const least = room < 560 ? 150 : 230;
    columns = Math.max(room < 560 ? 2 : 1, Math.floor((room + GAP) / (least + GAP)));
    width = Math.floor((room - GAP * (columns - 1)) / columns);
    height = Math.round(width / shape()) + (dailies.query.wanted.grouped ? CAPTION.ids : CAPTION.prompts);
    sheet.style.setProperty("--shape", String(shape()));
    lines = [];
    let top = 0;
    const line = (first, count, heading) => {
      lines.push({ top, first, count, heading });
      top += heading ? HEADING : height + GAP;
    };
    if (dailies.query.wanted.grouped) {
      const groups = await dailies.column("prompt_group");
      for (let first = 0; first < view().length;) {
        let last = first;
        while (last < view().length && groups[view()[last]] === groups[view()[first]]) last += 1;
        line(first, last - first, true);
        for (let at = first; at < last; at += columns) line(at, Math.min(columns, last - at), false);
        first = last;
      }
    } else {
      for (let at = 0; at < view().length; at += columns) line(at, Math.min(columns, view().length - at), false);
    }
    sheet.style.height = `${top}px`;
    for (const element of [...tiles.values(), ...headings.values()]) element.remove();
    tiles.clear();
    headings.clear();
    draw();
  }

  /* Width by height of the place for a picture: the clips' own where all have one, within reason. */
  function shape() {
    const [across, down] = ["width", "height"].map(name => dailies.columns.get(name));
    const own = across && down && across.const && down.const ? across.const / down.const : 16 / 9;
    return Math.min(16 / 9, Math.max(4 / 5, own));
  }

  /* The first line that ends below a height. */
  function lineAt(top) {
    let low = 0, high = lines.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      const end = lines[middle].top + (lines[middle].heading ? HEADING : height + GAP);
      if (end < top) low = middle + 1; else high = middle;
    }
    return low;
  }

  function draw() {
    due = false;
    if (sheet.offsetParent === null) return;
    const start = -sheet.getBoundingClientRect().top - AHEAD;
    const end = start + innerHeight + 2 * AHEAD;
    const keep = new Set(), keepHeadings = new Set();
    for (let number = lineAt(start); number < lines.length && lines[number].top < end; number += 1) {
      const line = lines[number];
      if (line.heading) {
        keepHeadings.add(number);
        if (!headings.has(number)) headings.set(number, heading(line));
        continue;
      }
      for (let place = 0; place < line.count; place += 1) {
        keep.add(line.first + place);
        if (!tiles.has(line.first + place)) tiles.set(line.first + place, tile(line.first + place, place, line.top));
      }
    }
    for (const [position, element] of tiles) {
      if (!keep.has(position) && element !== document.activeElement) { element.remove(); tiles.delete(position); }
    }
    for (const [number, element] of headings) {
      if (!keepHeadings.has(number)) { element.remove(); headings.delete(number); }
    }
  }

  const drawSoon = () => { if (!due) { due = true; requestAnimationFrame(draw); } };

  function heading(line) {
    const element = document.createElement("div");
    element.className = "heading";
    element.setAttribute("aria-hidden", "true");        // a listbox has options alone, and each says its prompt
    element.style.transform = `translateY(${line.top}px)`;
    const many = document.createElement("span");
    many.textContent = line.count === 1 ? "1 clip" : `${line.count} clips`;
    fill(view()[line.first], row => element.prepend(row.prompt || "No prompt"));
    element.append(many);
    sheet.append(element);
    return element;
  }

  /* Calls with the row: at once if it is here. */
  function fill(index, call) {
    const row = dailies.here(index);
    if (row) call(row); else dailies.row(index).then(call, dailies.fail);
  }

  function tile(position, place, top) {
    const element = document.createElement("div");
    element.className = "tile waits";
    element.setAttribute("role", "option");
    element.setAttribute("aria-posinset", position + 1);
    element.setAttribute("aria-setsize", view().length);
    element.tabIndex = position === cursor ? 0 : -1;
    element.dataset.position = position;
    element.style.width = `${width}px`;
    element.style.height = `${height}px`;
    element.style.transform = `translate(${place * (width + GAP)}px, ${top}px)`;
    sheet.append(element);
    fill(view()[position], row => { if (element.isConnected) dress(element, row); });
    return element;
  }

  function dress(element, row) {
    element.classList.remove("waits");
    const frame = document.createElement("div");
    frame.className = "frame";
    if (row.status === "done") frame.append(dailies.picture.element(row));
    const mark = document.createElement("span");
    mark.className = "mark";
    const caption = document.createElement("p");
    caption.textContent = dailies.query.wanted.grouped ? row.id : row.prompt || row.id;
    const small = document.createElement("small");
    small.textContent = dailies.query.wanted.grouped ? `seed ${row.seed}` : row.id + (row.sample ? ` · sample ${row.sample + 1}` : "");
    if (row.status === "failed") frame.append(label("lost", "failed"));
    else if (row.has_audio) frame.append(label("sound", "♪"));
    if (row.selected) frame.append(label("selected", "★ selected"));
    if (row.run) frame.append(label("other", dailies.said.runs[row.run].name));
    element.replaceChildren(frame, mark, caption, small);
    sortValue(row, small);
    decided(element, row);
  }

  function label(name, text) {
    const span = document.createElement("span");
    span.className = `label ${name}`;
    span.textContent = text;
    return span;
  }

  /* What the clips are sorted by stands in the caption. */
  function sortValue(row, small) {
    const name = dailies.query.wanted.sort;
    if (!name || ["id", "prompt", "clip_id"].includes(name)) return;
    dailies.decisions.column(name).then(values => {
      small.textContent = `${dailies.words(name, values[row.index])}  ·  ${row.id}`;
    });
  }

  function decided(element, row) {
    const { decision, note } = dailies.decisions.of(row);
    element.dataset.decision = decision || "";
    element.classList.toggle("noted", Boolean(note));
    element.setAttribute("aria-selected", decision === "pick");
    const state = decision ? { pick: "picked", reject: "rejected", redo: "to redo" }[decision] : "not judged";
    element.setAttribute("aria-label", `${row.prompt || row.id}. Seed ${row.seed}. ${row.status === "failed" ? "Failed"
      : state}${note ? `. Note: ${note}` : ""}`);
  }

  /* The tile of a row shows its decision, if it is in sight. */
  function refresh(row) {
    for (const [position, element] of tiles) if (view()[position] === row.index) decided(element, row);
  }

  /* The cursor goes to a position, and the window follows it. */
  function move(position, { focus = true } = {}) {
    if (!view().length) return;
    cursor = Math.min(view().length - 1, Math.max(0, position));
    for (const [at, element] of tiles) element.tabIndex = at === cursor ? 0 : -1;
    if (!focus) return;
    const line = lines.find(each => !each.heading && cursor >= each.first && cursor < each.first + each.count);
    const start = sheet.getBoundingClientRect().top + line.top;
    const above = document.querySelector(".bar").getBoundingClientRect().bottom + GAP;
    if (start < above) scrollBy({ top: start - above });
    else if (start + height > innerHeight - GAP) scrollBy({ top: start + height - innerHeight + GAP });
    draw();
    const element = tiles.get(cursor);
    if (element) element.focus({ preventScroll: true });
    for (let ahead = 1; ahead <= columns; ahead += 1) {
      const next = dailies.here(view()[cursor + ahead]);
      if (next) dailies.picture.fetchAhead(next);
    }
  }

  /* Up and down by lines, over headings. */
  function line(step) {
    const now = lines.findIndex(each => !each.heading && cursor >= each.first && cursor < each.first + each.count);
    let to = now + step;
    while (lines[to] && lines[to].heading) to += step;
    if (lines[to]) move(lines[to].first + Math.min(lines[to].count - 1, cursor - lines[now].first));
  }

  const of = target => target instanceof Element ? target.closest(".tile") : null;

  sheet.addEventListener("pointerover", event => {
    const element = of(event.target), picture = element && element.querySelector(".picture");
    if (picture && event.pointerType !== "touch" && !picture.timer && !QUIET.matches) dailies.picture.play(picture);
  });
  sheet.addEventListener("pointerout", event => {
    const element = of(event.target);
    if (!element || element.contains(event.relatedTarget)) return;
    const picture = element.querySelector(".picture");
    if (picture) dailies.picture.stop(picture);
  });
  /* Who wants no motion moves through the strip by hand. */
  sheet.addEventListener("pointermove", event => {
    const picture = QUIET.matches && of(event.target) && of(event.target).querySelector(".picture");
    if (!picture) return;
    const box = picture.getBoundingClientRect();
    const number = Math.floor((event.clientX - box.left) / box.width * dailies.picture.FRAMES);
    dailies.picture.frame(picture, Math.min(dailies.picture.FRAMES - 1, Math.max(0, number)));
  });
  sheet.addEventListener("click", event => {
    const element = of(event.target);
    if (!element) return;
    move(Number(element.dataset.position), { focus: false });
    dailies.viewer.open(cursor);
  });
  sheet.addEventListener("focusin", event => {
    if (of(event.target)) move(Number(of(event.target).dataset.position), { focus: false });
  });
  addEventListener("scroll", drawSoon, { passive: true });
  new ResizeObserver(entries => {
    const now = Math.round(entries[0].contentRect.width);
    if (dailies.columns && now && now !== laidOut) layout();
  }).observe(sheet);

  dailies.sheet = { layout, move, line, refresh, draw: drawSoon, fill,
    get cursor() { return cursor; }, get columns() { return columns; },
    get focused() { return of(document.activeElement) !== null; } };
})();
