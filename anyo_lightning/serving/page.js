"use strict";
// What is typed goes to /recommend as it is, and comes back as items, which go by their ids from then on: a title may be
// that of several. What came back is shown by textContent, never as HTML.
const at = (id) => document.getElementById(id);
let items = []; // {item_id, title}, oldest first
let asked = 0; // only the latest answer is shown

function element(name, text, parent) {
  const made = document.createElement(name);
  made.textContent = text;
  parent.append(made);
  return made;
}

function showHistory(shown) {
  at("history").replaceChildren();
  shown.forEach(({ title }, place) => {
    const entry = element("li", title, at("history"));
    const remove = element("button", "×", entry);
    remove.setAttribute("aria-label", `Remove ${title}`);
    remove.onclick = () => change(items.filter((_, other) => other !== place));
  });
}

function showLists(runs) {
  at("lists").replaceChildren();
  for (const { run, lists } of runs) {
    const section = element("section", "", at("lists"));
    element("h2", run, section);
    const list = element("ol", "", section);
    for (const { item_id, title, score } of lists[0]) {
      const row = element("div", "", element("li", "", list));
      const add = element("button", title, row);
      add.title = "Add to what you have had";
      add.onclick = () => change([...items, { item_id, title }]);
      element("span", score.toFixed(2), row).className = "score";
    }
    if (!lists[0].length) element("p", "Nothing is left to list.", section).className = "soft";
  }
}

async function change(wanted, typed = []) {
  const number = ++asked;
  if (!wanted.length && !typed.length) {
    items = [];
    at("error").textContent = "";
    showHistory([]);
    at("lists").replaceChildren();
    return;
  }
  let answer;
  try {
    const response = await fetch("recommend", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        ...(wanted.length && { items: wanted.map((item) => item.item_id) }),
        ...(typed.length && { titles: typed }),
        k: 10,
      }),
    });
    answer = await response.json();
  } catch {
    answer = { error: "The server does not answer." };
  }
  if (number !== asked) return;
  at("error").textContent = answer.error ?? "";
  if (answer.error) return;
  items = answer.runs[0].histories[0]; // as understood
  showHistory(items);
  showLists(answer.runs);
  at("title").value = "";
}

at("add").onsubmit = (event) => {
  event.preventDefault();
  const typed = at("title").value.split(";").map((title) => title.trim()).filter(Boolean);
  if (typed.length) change(items, typed);
};
at("clear").onclick = () => change([]);
fetch("titles")
  .then((response) => response.json())
  .then((found) => found.forEach((title) => (element("option", "", at("titles")).value = title)));
