// What all pages of ours share: the data, elements, colours and a plot's layout. Texts of users and catalogues go
// through textContent only; Plotly reads a little HTML in its texts, so labels that go there are escaped.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const COLOURS = ["#3d85c6", "#d9822b", "#2f9e6e", "#c8506a", "#8a63c9", "#8d6e4f", "#cf62a9", "#6f8496", "#a3961c", "#1fa3b3"];
const colour = (row) => COLOURS[row % COLOURS.length];
const round = (row) => Math.floor(row / COLOURS.length); // how often the colours have been used up before this row

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// A table of headers and of rows of cells.
function fillTable(table, headers, rows) {
  table.createTHead().insertRow().append(...headers.map((header) => Object.assign(element("th", header), { scope: "col" })));
  const body = table.createTBody();
  rows.forEach((cells) => body.insertRow().append(...cells));
}

function fill(select, options, chosen = 0) {
  options.forEach(([value, text]) => {
    const option = element("option", text);
    option.value = value;
    select.append(option);
  });
  if (options.length) select.selectedIndex = Math.min(chosen, options.length - 1);
}

const CONFIG = { displayModeBar: false, responsive: true, scrollZoom: false };
const INK = "#7a828c"; // the stylesheet gives texts and lines the theme's colours
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
// Rows that are called alike often differ in their ends.
const short = (text) => plain(text.length > 28 ? `${text.slice(0, 17)}…${text.slice(-10)}` : text);
const decimal = (value) => value.toFixed(3).replace(/^(-?)0\./, "$1.");
const marker = (row, size = 9) => ({ color: colour(row), size, symbol: ["circle", "diamond", "square", "triangle-up"][round(row) % 4] });

function layout(more) {
  const axis = { automargin: true, zeroline: false, gridcolor: INK, linecolor: INK, tickfont: { size: 12 }, ticks: "outside", ticklen: 5, tickcolor: "rgba(0,0,0,0)" };
  const { xaxis, yaxis, ...rest } = more;
  return {
    font: { size: 12.5, color: INK },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 8, r: 16, t: 8, b: 8 },
    dragmode: false,
    hovermode: "closest",
    xaxis: { ...axis, ...xaxis },
    yaxis: { ...axis, ...yaxis },
    ...rest,
  };
}

const say = (id, text) => { byId(id).textContent = text; };
const titled = (text) => ({ title: { text, standoff: 12 } });
