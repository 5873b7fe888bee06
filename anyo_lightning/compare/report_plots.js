// The plots.

const titleOf = (name) => data.metrics.find((metric) => metric.name === name).title;

const shows = (row, metric) => metric in data.variants[row].cells; // lists of another system lack some

// Variants that no other beats at the same or a lower cost.
function paretoFront(points) {
  const front = [];
  [...points].sort((a, b) => a.x - b.x || b.y - a.y).forEach((point) => {
    if (!front.length || point.y > front[front.length - 1].y) front.push(point);
  });
  return front;
}

function drawCost() {
  const metric = byId("cost-metric").value;
  const axis = byId("cost-axis").value;
  const rows = data.variants.map((_, row) => row).filter((row) => shows(row, metric));
  const known = rows.map((row) => ({ variant: data.variants[row], row, x: data.variants[row].cost[axis], y: data.variants[row].cells[metric].value }));
  const points = known.filter((point) => point.x > 0);
  const left = known.filter((point) => !(point.x > 0));
  const front = paretoFront(points);
  const costs = points.map((point) => point.x);
  const decades = Math.log10(Math.max(...costs) / Math.min(...costs));
  const traces = [
    { x: front.map((p) => p.x), y: front.map((p) => p.y), mode: "lines", line: { color: INK, width: 1.5, dash: "dot" }, hoverinfo: "skip", showlegend: false },
    ...points.map(({ variant, row, x, y }) => {
      const { low, high } = variant.cells[metric];
      return {
        x: [x], y: [y], mode: "markers", name: short(variant.label), marker: marker(row, 11),
        error_y: low === null ? undefined : { array: [high - y], arrayminus: [y - low], color: colour(row), thickness: 1.3, width: 0 },
        hovertemplate: `${plain(variant.label)}<br>${decimal(y)}<extra></extra>`,
      };
    }),
  ];
  const title = byId("cost-axis").selectedOptions[0].textContent;
  Plotly.react(byId("cost-plot"), traces, layout({
    height: 440,
    xaxis: { ...titled(title), type: "log", dtick: decades > 1.5 ? 1 : decades > 0.5 ? "D2" : undefined, tickformat: Math.max(...costs) >= 10000 ? "~s" : "~g" },
    yaxis: titled(titleOf(metric)),
    showlegend: true,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
  }), CONFIG);
  const without = left.map(({ variant, y }) => `${variant.label} (${decimal(y)})`).join(", ");
  say("cost-note", "The dotted line joins the variants that none beats at their cost; bars are 95% intervals over users."
    + (without ? ` Without a point, since nothing was measured or it is zero: ${without}.` : ""));
}

function drawCurves() {
  const name = byId("curve-metric").value;
  const axis = byId("curve-axis").value;
  const traces = [];
  data.variants.forEach((variant, row) => {
    variant.curves.filter((curve) => curve.points[name] && curve.points[name][axis]).forEach((curve, seed) => {
      const points = curve.points[name];
      traces.push({
        x: points[axis], y: points.value, mode: points.value.length > 25 ? "lines" : "lines+markers", name: short(variant.label),
        legendgroup: variant.label, showlegend: seed === 0, marker: marker(row, 5),
        line: { color: colour(row), width: 1.8, dash: ["solid", "dash", "dot", "dashdot"][round(row) % 4] },
        hovertemplate: `${plain(variant.label)}${curve.seed === null ? "" : `, seed ${curve.seed}`}<br>%{x:,} ${axis === "step" ? "steps" : axis}<br>%{y:.4f}<extra></extra>`,
      });
    });
  });
  byId("curve-plot").hidden = traces.length === 0;
  say("curve-note", traces.length ? "A line a run; a click on a name hides it, a double click shows it alone." : "None of these runs was trained.");
  if (!traces.length) return;
  Plotly.react(byId("curve-plot"), traces, layout({
    height: 440,
    xaxis: { ...titled(byId("curve-axis").selectedOptions[0].textContent), rangemode: "tozero", tickformat: ",~s" },
    yaxis: titled(byId("curve-metric").selectedOptions[0].textContent),
    showlegend: true,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
  }), CONFIG);
}

function drawSlices() {
  const metric = byId("slice-metric").value;
  const parts = data.slices.filter((part) => part.group === byId("slice-group").value);
  const largest = Math.max(...parts.flatMap((part) => part.metrics[metric].map((figure) => (figure ? figure[2] : 0))), 0.01);
  const shown = data.variants.map((_, row) => row).filter((row) => shows(row, metric));
  const labels = shown.map((row) => short(data.variants[row].label));
  const rows = shown.map((_, index) => index);
  byId("slice-plots").replaceChildren(...parts.map((part) => {
    const figure = element("div");
    const heading = element("h3", part.name);
    heading.append(element("span", `  ${part.users.toLocaleString("en")} users`));
    const plot = element("div", undefined, "plot");
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", `${titleOf(metric)} of ${part.users} users: ` + shown.map((row) => `${data.variants[row].label} ${decimal(part.metrics[metric][row][0])}`).join(", "));
    figure.append(heading, plot);
    return figure;
  }));
  parts.forEach((part, index) => {
    const figures = shown.map((row) => part.metrics[metric][row]);
    const x = figures.map((figure) => figure[0]);
    Plotly.newPlot(byId("slice-plots").children[index].lastChild, [{
      x, y: rows, mode: "markers", marker: { color: shown.map(colour), size: 9 },
      error_x: { array: figures.map((f) => f[2] - f[0]), arrayminus: figures.map((f) => f[0] - f[1]), color: INK, thickness: 1.4, width: 0 },
      text: figures.map((f, row) => `${plain(data.variants[shown[row]].label)}<br>${decimal(f[0])} [${decimal(f[1])}, ${decimal(f[2])}]`),
      hovertemplate: "%{text}<extra></extra>",
    }], layout({
      height: 56 + 21 * rows.length,
      xaxis: { range: [-0.02 * largest, 1.03 * largest], nticks: 5 },
      yaxis: { tickvals: rows, ticktext: labels, range: [rows.length - 0.4, -0.6] },
      showlegend: false,
    }), CONFIG);
  });
}

function drawPairs() {
  const metric = byId("pair-metric").value;
  const chosen = Number(byId("pair-variant").value);
  const { users, wins, difference, half } = data.pairs[metric];
  const others = data.variants.map((_, row) => row).filter((row) => row !== chosen && shows(row, metric) && shows(chosen, metric));
  const better = others.map((row) => wins[chosen][row] / users);
  const worse = others.map((row) => wins[row][chosen] / users);
  const equal = others.map((_, index) => 1 - better[index] - worse[index]);
  const bar = (name, x, color) => ({
    type: "bar", orientation: "h", name, x, y: others.map((_, index) => index), marker: { color },
    text: x.map((share) => (share < 0.06 ? "" : `${Math.round(100 * share)}%`)), textposition: "inside", insidetextanchor: "middle", textangle: 0,
    hovertemplate: others.map((row, index) => `vs ${plain(data.variants[row].label)}: ${name}<br>${Math.round(x[index] * users).toLocaleString("en")} of ${users.toLocaleString("en")} users<extra></extra>`),
  });
  const annotations = others.map((row, index) => {
    const value = difference[chosen][row];
    return { xref: "paper", x: 1.01, xanchor: "left", y: index, text: `${value < 0 ? "" : "+"}${decimal(value)} ±${decimal(half[chosen][row])}`, showarrow: false, font: { size: 12 } };
  });
  byId("pair-plot").hidden = others.length === 0;
  if (!others.length) return;
  Plotly.react(byId("pair-plot"), [bar("better", better, "#2b7fc0"), bar("equal", equal, "#7d858e"), bar("worse", worse, "#c4631f")], layout({
    height: 90 + 27 * others.length,
    barmode: "stack",
    bargap: 0.25,
    uniformtext: { mode: "hide", minsize: 11 },
    margin: { l: 8, r: 108, t: 8, b: 8 },
    xaxis: { range: [0, 1], tickformat: ".0%", nticks: 6 },
    yaxis: { tickvals: others.map((_, index) => index), ticktext: others.map((row) => `vs ${short(data.variants[row].label)}`), range: [others.length - 0.5, -0.5], showgrid: false },
    annotations,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal" },
  }), CONFIG);
}

// A section whose data are missing is left out.
function drawWhere(section, there, selects, draw) {
  byId(section).hidden = !there;
  if (!there) {
    document.querySelector(`nav a[href="#${section}"]`).remove();
    return;
  }
  selects.forEach((id) => byId(id).addEventListener("change", draw));
  draw();
}

function curveNames() {
  const names = new Set(data.variants.flatMap((variant) => variant.curves.flatMap((curve) => Object.keys(curve.points))));
  const first = data.metrics[0].name.replace("test/", "val/");
  return [...names].sort((a, b) => (b === first) - (a === first) || (b === "train/loss") - (a === "train/loss") || a.localeCompare(b, "en", { numeric: true }));
}

const costAxes = data.costs.filter((cost) => cost.axis).map((cost) => [cost.name, cost.axis]);
fill(byId("cost-metric"), metricOptions());
fill(byId("cost-axis"), costAxes);
fill(byId("curve-metric"), curveNames().map((name) => [name, name]));
fill(byId("slice-metric"), metricOptions(data.rankMetrics));
fill(byId("slice-group"), [...new Set(data.slices.map((part) => part.group))].map((group) => [group, group]));
fill(byId("pair-metric"), metricOptions(data.rankMetrics));
fill(byId("pair-variant"), variantOptions());
drawWhere("cost", costAxes.length > 0, ["cost-metric", "cost-axis"], drawCost);
drawWhere("curves", curveNames().length > 0, ["curve-metric", "curve-axis"], drawCurves);
drawWhere("slices", data.slices.length > 0, ["slice-metric", "slice-group"], drawSlices);
drawWhere("pairs", data.rankMetrics.length > 0 && data.variants.length > 1, ["pair-metric", "pair-variant"], drawPairs);

// Paper has a width of its own; plots do not follow it by themselves.
const plots = () => [...document.querySelectorAll(".js-plotly-plot")].filter((plot) => plot.offsetParent);
window.addEventListener("beforeprint", () => plots().forEach((plot) => Plotly.relayout(plot, { width: plot.closest(".grid") ? 330 : 690 })));
window.addEventListener("afterprint", () => plots().forEach((plot) => Plotly.relayout(plot, { width: null, autosize: true })));
