"use strict";
// Shows the questions that fit the filters. All it reads are attributes that the page wrote; it makes no markup.
const entries = [...document.querySelectorAll("article[data-sheet]")];
const said = new Map(entries.map(entry => [entry, entry.textContent.toLowerCase()]));
const form = document.getElementById("filters"), count = document.getElementById("count");
const fits = {
  text: (entry, wanted) => said.get(entry).includes(wanted.toLowerCase()),
  sheet: (entry, wanted) => entry.dataset.sheet === wanted,
  kind: (entry, wanted) => entry.dataset.kind === wanted,
  what: (entry, wanted) => entry.dataset.what.split(" ").includes(wanted),
};
function filter() {
  const wanted = [...new FormData(form)].filter(([name, value]) => value && fits[name]);
  let shown = 0;
  for (const entry of entries) {
    entry.hidden = !wanted.every(([name, value]) => fits[name](entry, value));
    shown += !entry.hidden;
  }
  count.textContent = `${shown} / ${entries.length}`;
}
for (const image of document.querySelectorAll("img[data-same]")) {
  image.src = document.getElementById(`p${image.dataset.same}`).src;
}
for (const cell of document.querySelectorAll("button[data-find]")) {
  cell.addEventListener("click", () => {
    for (const [name, value] of Object.entries(JSON.parse(cell.dataset.find))) form.elements[name].value = value;
    filter();
    form.scrollIntoView({ block: "start" });
  });
}
form.addEventListener("input", filter);
form.addEventListener("submit", event => event.preventDefault());
form.addEventListener("reset", () => setTimeout(filter));
filter();
