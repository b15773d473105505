// Light or dark, as chosen on the site beside; else as the machine is set. (A plain script in the head: no flash of the other.)
const machine = matchMedia("(prefers-color-scheme: dark)");
function setTheme() {
  const chosen = localStorage.getItem("quarto-color-scheme");
  document.documentElement.dataset.theme = (chosen ? chosen === "alternate" : machine.matches) ? "dark" : "light";
}
machine.addEventListener("change", setTheme);
addEventListener("storage", setTheme);                   // switched in another tab
setTheme();
