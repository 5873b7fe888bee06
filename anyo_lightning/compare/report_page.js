// The head and the table.

function variantOptions() {
  return data.variants.map((variant, row) => [String(row), variant.label]);
}

function metricOptions(names) {
  return data.metrics.filter((metric) => !names || names.includes(metric.name)).map((metric) => [metric.name, metric.title]);
}

// Each column: header, value to sort by, cell to show, and whether a first click sorts downwards.
function tableColumns() {
  const columns = [
    { header: "Variant", value: (v) => v.label.toLowerCase(), show: variantCell, down: false },
    { header: "Seeds", value: (v) => v.seeds, show: (v) => element("td", v.seeds), down: true },
  ];
  data.metrics.forEach((metric) => {
    const cell = (v) => v.cells[metric.name];
    // Lists of another system lack the metrics beyond their length.
    columns.push({ header: metric.title, value: (v) => cell(v)?.value, show: (v) => (cell(v) ? valueCell(cell(v)) : element("td", "-")), down: true });
    if (data.variants.some((v) => cell(v)?.deviation)) {
      columns.push({ header: "sd", value: (v) => number(cell(v)?.deviation), show: (v) => element("td", cell(v)?.deviation || "-"), down: true });
    }
    if (data.variants.some((v) => cell(v)?.difference)) {
      const difference = (v) => cell(v)?.difference;
      const base = (v) => element("td", v.baseline ? "base" : "-", "tag");
      columns.push({ header: "vs base", value: (v) => (difference(v) ? difference(v).value : null), show: (v) => (difference(v) ? differenceCell(difference(v)) : base(v)), down: true });
      columns.push({ header: "p", value: (v) => (difference(v) ? difference(v).p : null), show: (v) => element("td", difference(v) ? difference(v).pText : ""), down: false });
      columns.push({ header: "d", value: (v) => (difference(v) ? number(difference(v).effect) : null), show: (v) => element("td", difference(v) ? difference(v).effect : ""), down: true });
    }
  });
  data.costs.filter((cost) => cost.inTable).forEach(({ name }) => {
    columns.push({ header: name, value: (v) => v.cost[name], show: (v) => element("td", v.shown[name]), down: true });
  });
  return columns;
}

function number(text) {
  return text === null || text === undefined ? null : Number(text);
}

function variantCell(variant) {
  const cell = element("th", variant.label);
  cell.scope = "row";
  return cell;
}

function valueCell(figure) {
  const cell = element("td");
  cell.append(element("span", figure.text + (figure.nearBest ? "†" : ""), figure.best ? "best" : ""));
  if (figure.half) cell.append(element("span", ` ±${figure.half}`, "half"));
  return cell;
}

function differenceCell(difference) {
  const direction = difference.value > 0 ? "higher" : "lower";
  const cell = element("td");
  cell.append(element("span", difference.text, difference.clear ? direction : ""));
  cell.append(element("span", ` ±${difference.half}${difference.clear ? "*" : ""}`, "half"));
  return cell;
}

function drawTable() {
  const table = byId("results");
  const columns = tableColumns();
  const head = table.createTHead().insertRow();
  const body = table.createTBody();
  columns.forEach((column) => {
    const cell = element("th");
    cell.scope = "col";
    const button = element("button", column.header);
    button.type = "button";
    button.addEventListener("click", () => sortBy(column, cell));
    cell.append(button);
    head.append(cell);
  });

  function fillBody(variants) {
    body.replaceChildren(
      ...variants.map((variant) => {
        const row = element("tr");
        row.append(...columns.map((column) => column.show(variant)));
        return row;
      }),
    );
  }

  function sortBy(column, cell) {
    const before = cell.getAttribute("aria-sort");
    const down = before ? before === "ascending" : column.down;
    [...head.cells].forEach((other) => other.removeAttribute("aria-sort"));
    cell.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sorted = [...data.variants].sort((one, other) => {
      const [a, b] = [column.value(one), column.value(other)];
      if (a === null || a === undefined) return b === null || b === undefined ? 0 : 1; // nothing measured: last either way
      if (b === null || b === undefined) return -1;
      return (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1);
    });
    fillBody(sorted);
  }

  fillBody(data.variants);
  head.cells[columns.findIndex((column) => column.header === data.metrics[0].title)].setAttribute("aria-sort", "descending");
}

// All of the ledger that was measured, the same rows in the same order.
function drawLedger() {
  const costs = data.costs.map((cost) => cost.name);
  fillTable(byId("ledger"), ["Variant", ...costs], data.variants.map((variant) => [variantCell(variant), ...costs.map((name) => element("td", variant.shown[name]))]));
  byId("ledger-note").textContent = data.costNotes;
}

function drawHead() {
  const title = `${data.variants.length} variants compared`;
  document.title = title;
  byId("heading").textContent = title;
  byId("about").textContent = data.about;
  [...data.notes, "A click on a header sorts."].forEach((note) => byId("notes").append(element("li", note)));
}

// What anyo test --probe found; without a probed run neither the section nor the link to it.
function drawProbes() {
  const { tables } = data.probes;
  if (!tables.length) {
    byId("probes").remove();
    document.querySelector("nav a[href='#probes']").remove();
  }
  tables.forEach(({ note, headers, rows }) => {
    const table = element("table");
    fillTable(table, headers, rows.map((cells) => cells.map((cell) => element("td", cell))));
    const scroll = element("div", undefined, "scroll");
    scroll.tabIndex = 0;
    scroll.append(table);
    byId("probe-tables").append(scroll, element("p", note, "notes"));
  });
}

drawHead();
drawTable();
drawLedger();
drawProbes();
