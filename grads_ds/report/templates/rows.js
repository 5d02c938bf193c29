// Shows the rows section: reads the page's block of JSON, writes text nodes alone.
"use strict";
(() => {
  const root = document.querySelector(".lookup");
  const source = document.querySelector(".row-data");
  if (!root || !source) return;
  const data = JSON.parse(source.textContent);
  const at = (name) => root.querySelector("." + name);
  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  const shown = 50; // rows at a time
  const state = { sort: 0, up: true, first: 0, open: new Set() };
  const count = (n) => n.toLocaleString("en");
  const number = (v) => (v === null ? "–" : Number(v.toPrecision(4)).toLocaleString("en",
    { maximumSignificantDigits: 4 }).replace("-", "−"));

  // ---- controls, from the data ------------------------------------------------------------------

  const facets = data.fields.map((field, place) => {
    const label = make("label", field.name + " ");
    const select = make("select", undefined, "field");
    select.dataset.field = field.name;
    select.append(new Option("all", ""));
    field.values.forEach((value, code) => {
      const n = data.counts.reduce(
        (sum, line) => sum + (line[place] === code ? line[data.fields.length] : 0), 0);
      select.append(new Option(value + " (" + count(n) + ")", String(code)));
    });
    label.append(select);
    at("fields").append(label);
    return select;
  });
  data.columns.forEach((name, place) => at("column").append(new Option(name, String(place))));

  let texts = null; // lower case, made at the first search
  const text = (row) => {
    texts ??= data.texts.map((parts, i) =>
      (data.ids[i] + " " + parts.map((part) => part[1]).join(" ")).toLowerCase());
    return texts[row];
  };

  // ---- what is asked for ------------------------------------------------------------------------

  function matches() {
    const words = at("search").value.trim().toLowerCase();
    const choice = at("choice").value;
    const column = data.values[Number(at("column").value)];
    const [from, to] = ["from", "to"].map((name) => at(name).value);
    return data.ids.map((_, row) => row).filter((row) =>
      (choice === "" || data.selected[row] === Number(choice)) &&
      facets.every((f, i) => f.value === "" || data.codes[i][row] === Number(f.value)) &&
      (from === "" || (column[row] !== null && column[row] >= Number(from))) &&
      (to === "" || (column[row] !== null && column[row] <= Number(to))) &&
      (words === "" || text(row).includes(words)));
  }

  function inPool() {
    const [pool, chosen] = [data.fields.length, data.fields.length + 1];
    const choice = at("choice").value;
    return data.counts.reduce((sum, line) => {
      if (!facets.every((f, i) => f.value === "" || line[i] === Number(f.value))) return sum;
      const n = { "": line[pool], 1: line[chosen], 0: line[pool] - line[chosen] };
      return sum + n[choice];
    }, 0);
  }

  function sorted(rows) {
    const values = state.sort < 0 ? data.ids : data.values[state.sort];
    const sign = state.up ? 1 : -1;
    return rows.sort((a, b) => {
      if (values[a] === null || values[b] === null) // rows without the number come last
        return (values[a] === null) - (values[b] === null);
      return sign * (values[a] - values[b]) || data.ids[a] - data.ids[b];
    });
  }

  // ---- the table --------------------------------------------------------------------------------

  function head() {
    const line = make("tr");
    [["sample", -1], ...data.columns.map((name, place) => [name, place])].forEach(
      ([name, place]) => {
        const cell = make("th");
        const button = make("button", name + (state.sort === place
          ? (state.up ? " ↑" : " ↓") : ""), "sort");
        button.type = "button";
        button.dataset.sort = name;
        cell.setAttribute("aria-sort", state.sort !== place ? "none"
          : state.up ? "ascending" : "descending");
        button.addEventListener("click", () => {
          state.up = state.sort === place ? !state.up : true;
          state.sort = place;
          state.first = 0;
          draw();
        });
        cell.append(button);
        line.append(cell);
      });
    line.append(make("th", "choice", "left"));
    data.fields.forEach((field) => line.append(make("th", field.name, "left")));
    return line;
  }

  function line(row) {
    const out = make("tr", undefined, data.selected[row] ? "row main" : "row");
    const button = make("button", String(data.ids[row]), "open");
    button.type = "button";
    button.setAttribute("aria-expanded", String(state.open.has(row)));
    button.addEventListener("click", () => {
      if (!state.open.delete(row)) state.open.add(row);
      draw();
    });
    const first = make("td");
    first.append(button);
    out.append(first);
    data.values.forEach((values) => out.append(make("td", number(values[row]))));
    out.append(make("td", data.selected[row] ? "selected" : "–", "left"));
    data.fields.forEach((field, i) => {
      const cell = make("td", field.values[data.codes[i][row]], "left");
      cell.dir = "auto";
      cell.title = cell.textContent;
      out.append(cell);
    });
    return out;
  }

  function detail(row) {
    const cell = make("td", undefined, "detail");
    cell.colSpan = data.columns.length + data.fields.length + 2;
    const box = make("div");
    data.words[row].forEach((sentence) => box.append(make("p", sentence)));
    const list = make("dl");
    data.texts[row].forEach(([role, words]) => {
      [["dt", role], ["dd", words]].forEach(([tag, value]) => {
        const part = make(tag, value);
        part.dir = "auto";
        list.append(part);
      });
    });
    if (!data.texts[row].length)
      list.append(make("dd", "The prepared pool holds no text of this sample.", "absent"));
    box.append(list);
    if (data.tokens[row]) {
      const most = Math.max(1e-9, ...data.tokens[row].map((piece) => piece[1] ?? 0));
      box.append(make("p", "Target tokens, shaded by their loss: from none (0) to full ("
        + number(most) + " nats).", "meta"));
      const tokens = make("p", undefined, "tokens");
      tokens.dir = "auto";
      data.tokens[row].forEach(([words, loss]) => {
        const piece = make("span", words, loss === null ? "" : "token");
        if (loss !== null) {
          piece.title = number(loss) + " nats";
          piece.style.setProperty("--part", Math.round(100 * Math.max(0, loss) / most) + "%");
        }
        tokens.append(piece);
      });
      box.append(tokens);
    } else {
      box.append(make("p", data.missing || "No losses of its tokens were recorded.", "absent"));
    }
    cell.append(box);
    const out = make("tr", undefined, "opened");
    out.append(cell);
    return out;
  }

  function draw() {
    const rows = sorted(matches());
    state.first = Math.min(state.first, Math.max(0, rows.length - 1));
    state.first -= state.first % shown;
    const seen = rows.slice(state.first, state.first + shown);
    root.querySelector("thead").replaceChildren(head());
    root.querySelector("tbody").replaceChildren(...seen.flatMap((row) =>
      state.open.has(row) ? [line(row), detail(row)] : [line(row)]));
    at("found").textContent = count(rows.length) + " of the " + count(data.ids.length)
      + " rows held match; the filters match " + count(inPool()) + " of the pool's "
      + count(data.total) + ".";
    at("place").textContent = rows.length ? count(state.first + 1) + " to "
      + count(state.first + seen.length) : "none";
    at("back").disabled = state.first === 0;
    at("next").disabled = state.first + shown >= rows.length;
  }

  function turn(step) {
    state.first = Math.max(0, state.first + step);
    draw();
  }

  const asked = [...root.querySelectorAll("input, select")];
  const again = () => { state.first = 0; draw(); };
  asked.forEach((one) => one.addEventListener("input", again));
  at("clear").addEventListener("click", () => {
    asked.forEach((one) => { one.value = one.classList.contains("column") ? "0" : ""; });
    again();
  });
  at("back").addEventListener("click", () => turn(-shown));
  at("next").addEventListener("click", () => turn(shown));
  root.hidden = false;
  draw();
})();
