"use strict";
/* The night: what was made how fast, who was busy when, what failed and how to try it again, settings and versions. */

(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const WIDE = 720, HIGH = 180;
  const view = document.getElementById("view-night");

  function make(name, words, ...children) {
    const [tag, ...classes] = name.split(".");
    const element = document.createElement(tag);
    element.className = classes.join(" ");
    if (words !== null && words !== undefined) element.textContent = words;
    element.append(...children);
    return element;
  }

  function drawn(tag, attributes) {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  }

  const number = (value, digits = 0) => value.toLocaleString(undefined, { maximumFractionDigits: digits });

  /* A figure and what it counts: one hour where one is shown. */
  function gpuHours(hours) {
    const digits = hours < 1 ? 2 : 1;
    return [number(hours, digits), Number(hours.toFixed(digits)) === 1 ? "GPU hour" : "GPU hours"];
  }

  const money = (value, digits = 2) =>
    `$${value.toLocaleString(undefined, { minimumFractionDigits: digits, maximumFractionDigits: digits })}`;

  function span(seconds) {
    if (seconds < 100) return `${number(seconds)} s`;
    const minutes = Math.round(seconds / 60);
    return minutes < 100 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  }

  const size = bytes => bytes < 1e6 ? `${number(bytes / 1e3)} kB` : bytes < 1e9 ? `${number(bytes / 1e6, 1)} MB` : `${number(bytes / 1e9, 1)} GB`;
  /* A time of day, to the second where a night is so short that its minutes would repeat. */
  const clock = (seconds, night) => new Date(seconds * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit",
    ...(night.ended - night.began < 300 ? { second: "2-digit" } : {}) });
  const day = seconds => new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });

  /* Six figures, above the contact sheet. */
  function figures() {
    const { figures: said } = dailies.said;
    const night = said.night;
    const found = [[number(said.done), said.clips === said.done ? (said.done === 1 ? "clip done" : "clips done") : "rows done", "done"]];
    if (said.failed) found.push([number(said.failed), "failed", "failed"]);
    if (said.pending) found.push([number(said.pending), "pending", "pending"]);
    if (night.clips_per_hour) found.push([number(night.clips_per_hour, night.clips_per_hour < 10 ? 1 : 0), "clips per hour"]);
    if (night.worked_s) found.push([span(night.worked_s), "of work"]);
    if (said.clips) found.push([span(said.duration_s), "to watch"], [size(said.bytes), "of clips"]);
    if (said.cost !== null) found.push([money(said.cost), gpuHours(said.gpu_hours).join(" ")]);
    else if (said.gpu_hours) found.push(gpuHours(said.gpu_hours));
    document.getElementById("figures").replaceChildren(...found.map(([value, name, kind]) => {
      return make(`div${kind ? `.${kind}` : ""}`, null, make("dt", name), make("dd", value));      // drawn upside down
    }));
  }

  function card(title, ...content) {
    return make("section.card", null, make("h2", title), ...content);
  }

  function axis(svg, night, top, unit) {
    for (const share of [0, 0.5, 1]) {
      const y = HIGH - share * HIGH;
      svg.append(drawn("line", { x1: 0, x2: WIDE, y1: y, y2: y, class: "grid" }));
      const text = drawn("text", { x: WIDE + 8, y: y + 4, class: "tick" });
      text.textContent = share ? number(top * share, top < 10 ? 1 : 0) + (share === 1 ? unit : "") : "0";
      svg.append(text);
    }
    for (const share of [0, 0.25, 0.5, 0.75, 1]) {
      const text = drawn("text", { x: share * WIDE, y: HIGH + 20, class: `tick ${{ 0: "left", 0.5: "middle", 1: "right" }[share]
        || "middle quarter"}` });
      text.textContent = clock(night.began + share * (night.ended - night.began), night);
      svg.append(text);
    }
  }

  const chart = label => drawn("svg", { viewBox: `0 -8 ${WIDE + 60} ${HIGH + 34}`, role: "img", "aria-label": label });

  function pace(night) {
    const top = nice(Math.max(...night.per_hour, 1));
    const svg = chart(`Clips per hour, from ${clock(night.began, night)} to ${clock(night.ended, night)}`);
    axis(svg, night, top, "/h");
    const step = WIDE / night.per_hour.length;
    night.per_hour.forEach((value, place) => svg.append(drawn("rect", { x: place * step + 1, width: Math.max(1, step - 2),
      y: HIGH - value / top * HIGH, height: value / top * HIGH, class: "bar-mark", rx: 1.5 })));
    return card("Clips per hour", svg);
  }

  /* A round number that is not below. */
  function nice(value) {
    const power = 10 ** Math.floor(Math.log10(value));
    return [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].map(each => each * power).find(each => each >= value - 1e-9);
  }

  /* Each stage's copies that were busy, one above the other. */
  function busy(night) {
    const count = night.per_hour.length;
    const sums = night.stages.reduce((sum, stage) => sum.map((each, place) => each + stage.busy[place]), Array(count).fill(0));
    const top = nice(Math.max(...sums, 0.1));
    const svg = chart("Copies of each stage that were busy");
    axis(svg, night, top, "");
    let base = Array(count).fill(0);
    night.stages.forEach((stage, kind) => {
      const upper = base.map((each, place) => each + stage.busy[place]);
      // a slice's value stands in its middle, the first and the last reach to the edges
      const ends = values => [values[0], ...values, values[count - 1]];
      const point = (value, place) =>
        `${Math.min(count, Math.max(0, place - 0.5)) / count * WIDE},${HIGH - value / top * HIGH}`;
      const edge = [...ends(upper).map(point), ...ends(base).map(point).reverse()];
      svg.append(drawn("polygon", { points: edge.join(" "), class: `stage stage-${kind % 6}` }));
      base = upper;
    });
    const legend = make("ul.legend");
    night.stages.forEach((stage, kind) => {
      const mean = stage.seconds / Math.max(1, night.worked_s);
      legend.append(make("li", null, make(`i.stage-${kind % 6}`), make("b", stage.stage),
        make("span", `${number(stage.share * 100, 1)} % of the work`),
        make("span", `${number(mean, 2)} busy on average`), make("span", span(stage.seconds))));
    });
    return card("What was busy", svg, legend);
  }

  function quoted(text) {
    return /^[\w./:@%+=,-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
  }

  function command(text) {
    const button = make("button", "Copy");
    button.onclick = () => navigator.clipboard.writeText(text).then(() => dailies.tell("Copied."), () => {
      getSelection().selectAllChildren(code);
    });
    const code = make("code", text);
    return make("div.command", null, code, button);
  }

  function failures(said) {
    if (!said.failures.length) {
      return card("Failures", make("p.calm", said.done ? "Every row that was worked on has its clip." : "None so far."));
    }
    const list = make("ul.failures");
    for (const kind of said.failures) {
      const item = make("li", null, make("h3", null, make("b", number(kind.count)), " × ", kind.error_type || "other"));
      item.append(make("p.error", kind.error));
      for (const example of kind.examples) {
        item.append(make("p.example", null, make("span", example.id || ""), " ", example.prompt));
      }
      const uri = quoted(dailies.said.uri);
      if (kind.error_type === "invalid") {
        item.append(make("p.calm", "Another try changes nothing of these: mend them in the manifest, then render it again."));
      } else if (kind.error_type) {
        item.append(command(`dailies retry ${uri} --where ${quoted(`error_type=${kind.error_type}`)}`));
      }
      const look = make("button", "Show these rows");
      look.onclick = () => dailies.controls.only({ column: "error_type", how: "=", value: kind.error_type });
      if (kind.error_type) item.append(look);
      list.append(item);
    }
    return card("Failures", list, make("p.calm", "After that the same render command makes them."));
  }

  function cost(said) {
    const lines = make("dl.lines");
    const line = (name, value) => lines.append(make("dt", name), make("dd", value));
    const hours = value => number(value, value < 1 ? 4 : 2), kept = said.clips_gpu_hours, priced = said.cost !== null;
    const both = value => priced ? `${money(said.price * value)} · ${hours(value)} h` : `${hours(value)} h`;
    if (!said.gpu_hours) return card("Cost", make("p.calm", "No GPU was used, or the ledger does not say how long."));
    line("In all", both(said.gpu_hours));
    if (said.gpu_hours > kept) {
      line("Clips that are shown", both(kept));
      line("Older takes, failures", both(said.gpu_hours - kept));
    }
    if (priced) line("A GPU hour", money(said.price));
    if (priced && said.clips) line("A clip", money(said.price * kept / said.clips, 4));
    if (priced && said.duration_s) line("A second of video", money(said.price * kept / said.duration_s, 4));
    const why = priced ? "GPU time in which a clip was worked on, whether it counts now or not. What GPUs were held beyond "
      + "that, render says when it ends." : "Say what a GPU hour costs: dailies report URI --price 2.50";
    return card("Cost", lines, make("p.calm", why));
  }

  function pairs(title, lines) {
    if (!lines.length) return [];
    const list = make("dl.lines");
    for (const [name, value] of lines) list.append(make("dt", String(name)), make("dd", String(value)));
    return [card(title, list)];
  }

  function show() {
    const { figures: said, about } = dailies.said;
    const night = said.night;
    const when = night.began ? `${day(night.began)} to ${day(night.ended)}` : "Nothing was made yet";
    const wide = make("div.wide");
    if (night.per_hour.length) wide.append(pace(night), busy(night));
    wide.append(failures(said));
    const counted = lines => lines.map(([text, count]) => [text, number(count)]);
    const narrow = make("div.narrow", null, cost(said), ...pairs("Where it ran", counted(said.devices)),
      ...pairs("Not quite as asked", counted(said.fallbacks)), ...pairs("Noted on the way", counted(said.notes)),
      ...dailies.said.runs.slice(1).map(run => pairs(`Beside: ${run.name}`, [["run folder", run.uri], ["model", run.model],
        ["rows", number(run.rows)]])).flat(),
      ...Object.entries(about).map(([title, lines]) => pairs(title, lines)).flat());
    const links = dailies.said.links_end_at ? ` Its links to clips work until ${day(dailies.said.links_end_at)}.` : "";
    view.replaceChildren(make("p.when", `${when}. This report is of ${day(dailies.said.made_at)}.${links}`),
      make("div.columns", null, wide, narrow));
  }

  dailies.night = { figures, show, size, day, quoted };
})();
