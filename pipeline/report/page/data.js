"use strict";
/* The data of a report: scripts that call dailies.head and dailies.put, because from a disk a page may load scripts
   and nothing else. Rows come in pages of what a tile shows, all other columns in blocks, each when it is wanted. */

window.dailies = {};

(() => {
  const arrived = new Map();            // file -> what it holds
  const coming = new Map();             // file -> promise of it
  const CLIP_ID = /^[0-9a-f]{64}$/;
  let said = null;                      // the head

  dailies.head = payload => { said = payload; };
  dailies.put = (file, payload) => { arrived.set(file, payload); };

  /* What a file holds; it is fetched once. */
  function file(name) {
    if (!coming.has(name)) {
      coming.set(name, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = name;
        script.onload = () => { script.remove(); resolve(arrived.get(name)); };
        script.onerror = () => { script.remove(); coming.delete(name); reject(new Error(`${name} cannot be loaded`)); };
        document.head.append(script);
      }));
    }
    return coming.get(name);
  }

  async function open() {
    await file(`data/head.js?${Date.now()}`);
    if (!said || said.format !== 1) throw new Error("data/head.js is not there, or of another version of dailies");
    dailies.said = said;
    dailies.columns = new Map(said.sheet.columns.map(column => [column.name, column]));
    dailies.rows = said.sheet.rows;
    const current = dailies.columns.get("current");
    dailies.earlier = Boolean(current && (current.files || !current.const) && said.sheet.rows);
  }

  /* Packed values as a list: all of them, or distinct ones and which, or one for all. */
  function unpacked(packed) {
    if (packed.v) return packed.v;
    if (packed.d) return packed.i.map(place => packed.d[place]);
    return new Array(packed.n).fill(packed.c);
  }

  // Pages: what a tile shows.

  const pages = new Map();

  async function page(number) {
    if (pages.has(number)) return pages.get(number);
    const held = await file(said.sheet.pages[number]);
    const columns = Object.entries(held).filter(([name]) => name !== "links")
      .map(([name, packed]) => [name, unpacked(packed)]);
    const first = number * said.sheet.page_rows;
    const rows = columns[0][1].map((_, place) => {
      const row = { index: first + place };
      for (const [name, values] of columns) row[name] = values[place];
      return addressed(row, held.links, place);
    });
    pages.set(number, rows);
    return rows;
  }

  /* Where the clip and its poster lie; nothing for a name that no clip has. */
  function addressed(row, links, place) {
    const base = said.runs[row.run || 0].base;
    const ours = row.status === "done" && CLIP_ID.test(row.clip_id || "");
    const at = (kind, key) => {
      if (!links) return `${base}${key}`;
      const link = links[kind][place];
      return link && links.patterns[link[0]].replace("{key}", key).replace("{signature}", link[1]);
    };
    row.clip = ours ? at("clip", `clips/${row.clip_id.slice(0, 2)}/${row.clip_id}.mp4`) : null;
    row.picture = ours && row.poster ? at("poster", `posters/${row.clip_id.slice(0, 2)}/${row.clip_id}.webp`) : null;
    return row;
  }

  const pageOf = index => Math.floor(index / said.sheet.page_rows);

  /* The row if it is here already, or null. */
  function here(index) {
    const rows = pages.get(pageOf(index));
    return rows ? rows[index - rows[0].index] : null;
  }

  async function row(index) {
    await page(pageOf(index));
    return here(index);
  }

  /* All pages. */
  const allPages = () => Promise.all(said.sheet.pages.map((_, number) => page(number)));

  // Columns: one value for each row.

  const whole = new Map();

  function column(name) {
    if (!whole.has(name)) {
      const mine = fetched(name);
      mine.catch(() => whole.delete(name));             // whoever asks again fetches again
      whole.set(name, mine);
    }
    return whole.get(name);
  }

  async function fetched(name) {
    const about = dailies.columns.get(name);
    if (!about) throw new Error(`there is no column ${name}`);
    if (about.tile) return (await allPages()).flatMap(rows => rows.map(each => each[name]));
    if (!about.files) return new Array(said.sheet.rows).fill(about.const);
    return (await Promise.all(about.files.map(file))).flatMap(unpacked);
  }

  Object.assign(dailies, { open, page, here, row, allPages, column });
})();
