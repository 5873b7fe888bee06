// The case browser: one test row at a time, with what each variant recommended.

const cases = data.cases;
const rankOf = (rank) => (rank === null ? Infinity : rank); // of a target that is not in another system's list
const place = (rank) => (Number.isInteger(rank) ? rank : rank.toFixed(1)).toLocaleString("en");

function matching() {
  const filter = byId("case-filter").value;
  const [first, second] = ["case-first", "case-second"].map((id) => Number(byId(id).value));
  const wanted = byId("case-search").value.trim().toLowerCase();
  return cases.rows.map((row, index) => ({ row, index })).filter(({ row }) => {
    const [one, other] = [rankOf(row.ranks[first]), rankOf(row.ranks[second])];
    if (filter === "first" && !(one < other)) return false;
    if (filter === "second" && !(other < one)) return false;
    return !wanted || row.user.toLowerCase().includes(wanted) || cases.items[row.target].toLowerCase().includes(wanted);
  });
}

function drawCaseList() {
  const list = byId("case-list");
  const found = matching();
  list.replaceChildren();
  const telling = found.findIndex(({ row }) => rankOf(row.ranks[0]) <= 10); // one where the best variant's list has the target
  fill(list, found.map(({ row, index }) => [String(index), `${row.user}: ${cases.items[row.target]}`]), Math.max(telling, 0));
  byId("case-count").textContent = `${found.length.toLocaleString("en")} ${found.length === 1 ? "case" : "cases"} (user: target)`;
  drawCase();
}

function item(index, target) {
  const line = element("li");
  line.append(element("span", cases.items[index], index === target ? "target" : ""));
  return line;
}

function block(title, note, items, className) {
  const made = element("div", undefined, className);
  const heading = element("h3", title);
  if (note) heading.append(element("span", ` ${note}`, "tag"));
  const list = element("ol");
  list.append(...items);
  made.append(heading, list);
  return made;
}

function drawCase() {
  const shown = byId("case");
  const row = cases.rows[Number(byId("case-list").value)];
  if (byId("case-list").selectedIndex < 0 || !row) {
    shown.replaceChildren(element("p", "No case matches."));
    return;
  }
  const facts = element("p", undefined, "facts");
  facts.append(`User ${row.user}, target `, element("span", cases.items[row.target], "target"));
  const count = row.targetCount;
  facts.append(`, ${count === 0 ? "never seen in training" : `${count.toLocaleString("en")} training interactions`}`);
  facts.append(row.tied ? ", its time shared with another interaction." : ".");
  const lists = element("div", undefined, "lists");
  const left = row.historyLength - row.history.length;
  const note = `${row.historyLength.toLocaleString("en")} items, latest first${left ? `, ${left.toLocaleString("en")} earlier ones not shown` : ""}`;
  const history = block("History", note, row.history.map((index) => item(index)), "history");
  history.querySelector("ol").tabIndex = 0;
  lists.append(history);
  data.variants.forEach((variant, number_) => {
    const rank = row.ranks[number_];
    lists.append(block(variant.label, rank === null ? "without the target" : `target at ${place(rank)}`, row.lists[number_].map((index) => item(index, row.target))));
  });
  shown.replaceChildren(facts, lists);
}

function step(by) {
  const list = byId("case-list");
  const next = list.selectedIndex + by;
  if (next < 0 || next >= list.options.length) return;
  list.selectedIndex = next;
  drawCase();
}

byId("case-note").textContent = `${cases.note} The target is highlighted; its rank stands beside each name.`;
fill(byId("case-first"), variantOptions(), 0);
fill(byId("case-second"), variantOptions(), 1);
["case-filter", "case-first", "case-second"].forEach((id) => byId(id).addEventListener("change", drawCaseList));
byId("case-search").addEventListener("input", drawCaseList);
byId("case-list").addEventListener("change", drawCase);
byId("case-previous").addEventListener("click", () => step(-1));
byId("case-next").addEventListener("click", () => step(1));
drawCaseList();
