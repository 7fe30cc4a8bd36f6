/** The tabs of the page, as the ARIA practices describe them; the address names the open one. */

const tabs = [...document.querySelectorAll("[role=tab]")];
const panelOf = (tab) => document.getElementById(tab.getAttribute("aria-controls"));

function open(chosen) {
  for (const tab of tabs) {
    const isChosen = tab === chosen;
    tab.ariaSelected = isChosen;
    tab.tabIndex = isChosen ? 0 : -1;
    if (!isChosen && !panelOf(tab).hidden) panelOf(tab).dispatchEvent(new Event("close"));
    panelOf(tab).hidden = !isChosen;
  }
  panelOf(chosen).dispatchEvent(new Event("open"));
}

const named = () => tabs.find((tab) => tab.dataset.name === location.hash.slice(1)) ?? tabs[0];

for (const [index, tab] of tabs.entries()) {
  tab.addEventListener("click", () => {
    history.replaceState(null, "", `#${tab.dataset.name}`);
    open(tab);
  });
  tab.addEventListener("keydown", ({ key }) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[key];
    if (!step) return;
    const next = tabs.at((index + step) % tabs.length);
    next.focus();
    next.click();
  });
}

window.addEventListener("hashchange", () => open(named()));
open(named());
