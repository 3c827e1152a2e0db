"use strict";
/* The bar above the contact sheet: words, what is shown, filters, the sort. */

(() => {
  const one = name => document.getElementById(name);
  const { wanted } = dailies.query;
  const SHOWN = [["all", "All"], ["undecided", "To judge"], ["pick", "Picked"], ["reject", "Rejected"], ["redo", "Redo"],
    ["failed", "Failed"]];
  const HIDDEN = dailies.HIDDEN = new Set(["run", "prompt_group", "poster", "current"]);
  const HASH = /^[0-9a-f]{40,}$/;
  const UNITS = { bytes: "size", peak_memory_bytes: "size" };

  dailies.GROUPS = ["Your columns", "Measured", "Ledger"];
  dailies.groupOf = name => dailies.GROUPS[name.startsWith("user.") ? 0 : name.startsWith("quality.") ? 1 : 2];
  dailies.label = name => name.replace(/^(quality|user|seconds)\./, "").replace(/_s$/, "").replaceAll("_", " ");

  /* A value as a person reads it. */
  dailies.words = (name, value) => {
    if (value === null || value === undefined) return "–";
    const about = dailies.columns.get(name);
    if (UNITS[name]) return dailies.night.size(Number(value));
    if (about.kind === "time") return new Date(value * 1000).toLocaleString();
    if (about.kind === "bool") return value ? "yes" : "no";
    if (about.kind === "number") {
      const text = Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
      return name.endsWith("_s") ? `${text} s` : text;
    }
    return HASH.test(value) ? `${value.slice(0, 12)}…` : String(value);
  };

  /* Columns as a select offers them. */
  function offer(select, first) {
    const groups = Object.fromEntries(dailies.GROUPS.map(title => [title, []]));
    for (const [name, about] of dailies.columns) {
      // of a column that nobody filled there is no choice; a decision or a note may be in this browser alone
      if (HIDDEN.has(name) || about.const === null && !dailies.decisions.JUDGED.includes(name)) continue;
      groups[dailies.groupOf(name)].push(name);
    }
    select.replaceChildren(...first);
    for (const [title, names] of Object.entries(groups)) {
      if (!names.length) continue;
      const group = document.createElement("optgroup");
      group.label = title;
      group.append(...names.map(name => new Option(dailies.label(name), name)));
      select.append(group);
    }
  }

  function open() {
    offer(one("sort"), [new Option("as finished", "")]);
    offer(one("filter-column"), []);
    one("shown").replaceChildren(...SHOWN.filter(([name]) => name !== "failed" || dailies.said.figures.failed)
      .map(([name, text]) => {
        const button = document.createElement("button");
        button.textContent = text;
        button.dataset.shown = name;
        button.onclick = () => { wanted.shown = name; again(); };
        return button;
      }));
    compare();
  }

  /* The question has changed: ask, and show what came. */
  async function again() {
    for (const button of one("shown").children) {
      button.setAttribute("aria-pressed", button.dataset.shown === wanted.shown);
    }
    chips();
    document.body.classList.add("asking");
    try {
      if (!await dailies.query.run()) return;
      await dailies.sheet.layout();
    } catch (error) {
      dailies.fail(error);
      return;
    } finally {
      document.body.classList.remove("asking");
    }
    dailies.sheet.move(0, { focus: false });
    const found = dailies.query.view.length;
    const whole = !wanted.words && !wanted.filters.length && wanted.shown === "all";
    one("count").textContent = whole ? `${found.toLocaleString()} ${found === 1 ? "row" : "rows"}`
      : `${found.toLocaleString()} of ${dailies.rows.toLocaleString()} rows`;
    nothing(found);
  }

  function nothing(found) {
    const empty = one("empty");
    empty.hidden = found > 0;
    if (found) return;
    const [title, text] = empty.children, button = empty.querySelector("button");
    const none = dailies.rows === 0;
    title.textContent = none ? "Nothing here yet" : wanted.shown === "undecided" && !wanted.words && !wanted.filters.length
      ? "All judged" : "No clip fits";
    text.textContent = none ? "The first clips come with the next report: load this page again then. With render --report 5m "
      + "one is written every five minutes."
      : title.textContent === "All judged" ? "Every clip has its decision." : "Take a word or a filter away.";
    button.hidden = none;
    button.textContent = "Show all";
    button.onclick = clear;
  }

  function clear() {
    Object.assign(wanted, { words: "", shown: "all", filters: [] });
    one("search").value = "";
    again();
  }

  function chips() {
    one("filters").replaceChildren(...wanted.filters.map(filter => {
      const chip = document.createElement("button");
      const how = dailies.query.howsOf(dailies.columns.get(filter.column)).find(each => each[1] === filter.how)[0];
      chip.textContent = `${dailies.label(filter.column)} ${how} ${filter.how === "none" ? "" : filter.value}  ×`;
      chip.setAttribute("aria-label", `Take away: ${chip.textContent}`);
      chip.onclick = () => { wanted.filters = wanted.filters.filter(each => each !== filter); again(); };
      return chip;
    }));
  }

  /* What can be asked of the chosen column. */
  function compare() {
    const about = dailies.columns.get(one("filter-column").value);
    if (!about) return;
    one("filter-how").replaceChildren(...dailies.query.howsOf(about).map(([text, how]) => new Option(text, how)));
    const values = about.name === "decision" ? dailies.decisions.DECISIONS : about.values || [];
    one("filter-values").replaceChildren(...values.map(value => new Option(value)));
    const span = about.least !== undefined && about.kind !== "time" ? `${dailies.words(about.name, about.least)} to ${
      dailies.words(about.name, about.most)}` : about.kind === "time" ? "2026-01-31 04:00" : "";
    one("filter-value").placeholder = span || (about.const !== undefined ? String(about.const ?? "") : "");
    one("filter-value").value = "";
  }

  function only(filter) {
    Object.assign(wanted, { words: "", shown: "all", filters: [filter] });
    one("search").value = "";
    dailies.show("clips");
    again();
  }

  let later = null;
  one("search").addEventListener("input", event => {
    clearTimeout(later);
    later = setTimeout(() => { wanted.words = event.target.value; again(); }, 120);
  });
  one("sort").addEventListener("change", event => { wanted.sort = event.target.value; again(); });
  one("direction").onclick = () => {
    wanted.descending = !wanted.descending;
    const button = one("direction");
    button.textContent = wanted.descending ? "↓" : "↑";
    button.setAttribute("aria-pressed", wanted.descending);
    again();
  };
  function group() {
    wanted.grouped = !wanted.grouped;
    one("group").setAttribute("aria-pressed", wanted.grouped);
    again();
  }
  one("group").onclick = group;
  one("add-filter").onclick = () => {
    const form = one("filter-form");
    form.hidden = !form.hidden;
    one("add-filter").setAttribute("aria-expanded", !form.hidden);
    if (!form.hidden) one("filter-column").focus();
  };
  one("filter-column").addEventListener("change", compare);
  one("filter-form").addEventListener("submit", event => {
    event.preventDefault();
    const filter = { column: one("filter-column").value, how: one("filter-how").value, value: one("filter-value").value };
    if (filter.how !== "none" && dailies.query.valueOf(dailies.columns.get(filter.column), filter.value) === undefined) {
      dailies.tell(`${dailies.label(filter.column)} is compared with ${
        dailies.columns.get(filter.column).kind === "time" ? "a time such as 2026-01-31 04:00" : "a number"}.`);
      return;
    }
    wanted.filters.push(filter);
    one("filter-form").hidden = true;
    one("add-filter").setAttribute("aria-expanded", "false");
    again();
  });

  dailies.controls = { open, again, only, group, clear };
})();
