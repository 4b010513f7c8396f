// Light or dark: as the system has it, or as the button was last pressed. Runs before the page is drawn, so that it
// does not flash. The choice is all that this page ever stores.
"use strict";
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");

  function stored() {
    try {
      return localStorage.getItem("uld-theme");
    } catch {
      return null; // storage is switched off
    }
  }

  function show(theme) {
    root.dataset.theme = theme;
    document.getElementById("theme")?.setAttribute("aria-pressed", String(theme === "dark"));
  }

  function current() {
    return stored() ?? (system.matches ? "dark" : "light");
  }

  function toggle() {
    const next = root.dataset.theme === "dark" ? "light" : "dark";
    show(next);
    try {
      localStorage.setItem("uld-theme", next);
    } catch {
      // It holds until the page is left.
    }
  }

  show(current());
  system.addEventListener("change", () => show(current()));
  document.addEventListener("DOMContentLoaded", () => {
    show(root.dataset.theme);
    document.getElementById("theme").addEventListener("click", toggle);
  });
})();
