"use strict";
/* Which clips are shown, in which order: words of the prompt, filters by any column, a sort, groups of one prompt. */

(() => {
  const wanted = {
    words: "",
    shown: "all",                       // all, undecided, pick, reject, redo, failed
    filters: [],                        // {column, how, value}
    sort: "",                           // "" is the order in which they were finished
    descending: false,
    grouped: false,
  };
  let view = new Int32Array(0);         // rows, by their index
  let asked = 0;

  const HOWS = {
    number: [["≥", ">="], ["≤", "<="], ["=", "="], ["≠", "!="]],
    text: [["contains", "has"], ["=", "="], ["≠", "!="], ["is empty", "none"]],
    bool: [["=", "="]],
  };
  const kindOf = column => column.kind === "time" ? "number" : column.kind === "integer" ? "number" : column.kind;
  const howsOf = column => [...HOWS[kindOf(column)] || HOWS.text];

  /* A filter's value as the column has it; undefined for what it cannot have. */
  function valueOf(column, text) {
    if (column.kind === "time") {
      const moment = Date.parse(text);
      return Number.isNaN(moment) ? undefined : moment / 1000;
    }
    if (column.kind === "number") return text.trim() === "" || Number.isNaN(Number(text)) ? undefined : Number(text);
    if (column.kind === "integer") return /^-?\d+$/.test(text.trim()) ? text.trim() : undefined;
    if (column.kind === "bool") return /^(1|true|yes)$/i.test(text.trim()) ? 1 : 0;
    return text;
  }

  const big = value => typeof value === "string" ? BigInt(value) : value;

  function test({ column, how, value }) {
    const about = dailies.columns.get(column);
    const want = valueOf(about, value);
    if (how === "none") return each => each === null || each === undefined || each === "";
    if (how === "has") {
      const lower = String(want).toLowerCase();
      return each => each !== null && each !== undefined && String(each).toLowerCase().includes(lower);
    }
    const exact = about.kind === "integer" ? each => each !== null && big(String(each)) : each => each;
    const to = about.kind === "integer" ? big(want) : want;
    return {
      "=": each => exact(each) === to,
      "!=": each => exact(each) !== to,
      ">=": each => each !== null && exact(each) >= to,
      "<=": each => each !== null && exact(each) <= to,
    }[how];
  }

  /* Makes the view anew; false where another question came meanwhile. */
  async function run() {
    const mine = asked += 1;
    const tests = [];                   // index -> whether it stays
    if (dailies.earlier) {
      const current = await dailies.column("current");
      tests.push(index => current[index]);              // what a newer take has replaced is seen side by side
    }
    if (wanted.shown === "failed") {
      const status = await dailies.column("status");
      tests.push(index => status[index] === wanted.shown);
    } else if (wanted.shown !== "all") {
      await dailies.allPages();
      tests.push(index => {
        const row = dailies.here(index);
        const decision = dailies.decisions.of(row).decision;
        return wanted.shown === "undecided" ? !decision && row.status === "done" : decision === wanted.shown;
      });
    }
    const words = wanted.words.toLowerCase().split(/\s+/).filter(Boolean);
    if (words.length) {
      const texts = await lowered();
      tests.push(index => words.every(word => texts[index].includes(word)));
    }
    for (const filter of wanted.filters) {
      const values = await dailies.decisions.column(filter.column);
      const fits = test(filter);
      tests.push(index => fits(values[index]));
    }
    let kept = [];
    for (let index = 0; index < dailies.rows; index += 1) if (tests.every(fits => fits(index))) kept.push(index);
    kept = await sorted(kept);
    if (wanted.grouped) kept = await inGroups(kept);
    if (mine !== asked) return false;
    view = Int32Array.from(kept);
    return true;
  }

  let texts = null;

  async function lowered() {
    if (!texts) {
      const [prompts, ids] = await Promise.all([dailies.column("prompt"), dailies.column("id")]);
      texts = prompts.map((prompt, index) => `${prompt || ""}\n${ids[index]}`.toLowerCase());
    }
    return texts;
  }

  async function sorted(kept) {
    if (!wanted.sort) return wanted.descending ? kept.reverse() : kept;
    const values = await dailies.decisions.column(wanted.sort);
    const about = dailies.columns.get(wanted.sort);
    const collator = new Intl.Collator(undefined, { numeric: true });
    const ahead = wanted.descending ? -1 : 1;
    const compare = about.kind === "text" ? (one, other) => collator.compare(one, other)
      : (one, other) => Number(one) - Number(other);
    return kept.sort((one, other) => {
      const [a, b] = [values[one], values[other]];
      const [noA, noB] = [a === null || a === undefined, b === null || b === undefined];
      if (noA || noB) return noA === noB ? one - other : noA ? 1 : -1;      // what is not known comes last
      return ahead * compare(a, b) || one - other;
    });
  }

  /* Rows of one prompt beside each other, the groups in the order of their first. */
  async function inGroups(kept) {
    const groups = await dailies.column("prompt_group");
    const members = new Map();
    for (const index of kept) {
      if (!members.has(groups[index])) members.set(groups[index], []);
      members.get(groups[index]).push(index);
    }
    return [...members.values()].flat();
  }

  /* All rows of the prompt of a row, whatever is filtered. */
  async function sameprompt(row) {
    const groups = await dailies.column("prompt_group");
    const found = [];
    groups.forEach((group, index) => { if (group === groups[row.index]) found.push(index); });
    return found;
  }

  dailies.query = { wanted, run, howsOf, valueOf, sameprompt, get view() { return view; } };
})();
