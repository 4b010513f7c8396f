// Elements made of text, never of markup.

/** A new element; `content` is its text, or its children. */
export function make(tag, className = "", content = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...(Array.isArray(content) ? content : [content]));
  return element;
}

export function byId(id) {
  return document.getElementById(id);
}
