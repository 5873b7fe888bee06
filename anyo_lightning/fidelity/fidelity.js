// The page of `anyo index`: recall against queries a second, and the table.

function drawPlot() {
  const kinds = [...new Set(data.indexes.map((index) => index.kind))];
  const traces = kinds.map((kind, row) => {
    const points = data.indexes.filter((index) => index.kind === kind).sort((a, b) => a.recall - b.recall);
    return {
      x: points.map((p) => p.recall), y: points.map((p) => p.queries_per_second), name: short(kind), marker: marker(row, 11),
      mode: points.length > 1 ? "lines+markers+text" : "markers+text", line: { color: colour(row), width: 1.5, dash: "dot" },
      text: points.map((p) => plain(p.parameters)), textposition: "bottom left", textfont: { size: 11 }, cliponaxis: false,
      hovertemplate: points.map((p) => `${plain(p.factory)}<br>recall@${data.k} ${decimal(p.recall)}, NDCG@${data.k} ${p.ndcg_change < 0 ? "" : "+"}${p.ndcg_change.toFixed(4)}<br>${Math.round(p.queries_per_second).toLocaleString("en")} queries/s, ${(p.size / 1e6).toFixed(2)} MB<extra></extra>`),
    };
  });
  const lowest = Math.min(...data.indexes.map((index) => index.recall));
  const room = Math.max(0.01, 1 - lowest) * 0.12;
  const speeds = data.indexes.map((index) => index.queries_per_second);
  const decades = Math.log10(Math.max(...speeds) / Math.min(...speeds));
  Plotly.newPlot(byId("plot"), traces, layout({
    height: 460,
    xaxis: { ...titled(`recall@${data.k} against exact search`), range: [lowest - 3 * room, 1 + room], tickformat: "~g" },
    yaxis: { ...titled("queries a second"), type: "log", dtick: decades > 1.5 ? 1 : "D2", tickformat: "~s" },
    showlegend: true,
    legend: { orientation: "h", y: 1.04, yanchor: "bottom", x: 0 },
  }), CONFIG);
}

function drawTable() {
  const cell = (column, position, row) => position ? element("td", column.texts[row]) : Object.assign(element("th", column.texts[row]), { scope: "row" });
  const rows = data.indexes.map((_, row) => data.columns.map((column, position) => cell(column, position, row)));
  fillTable(byId("results"), data.columns.map((column) => column.header), rows);
}

byId("about").textContent = data.about;
data.notes.forEach((note) => byId("notes").append(element("li", note)));
drawPlot();
drawTable();
