// Making nodes. Everything on the page is made here or with createElementNS: never from HTML text.

export const $ = (id) => document.getElementById(id);

// children may come in lists: a call has no room for the hundred thousand that hostile text makes
export function element(name, ...children) {
  const node = document.createElement(name);
  for (const child of children.flat()) node.append(child);
  return node;
}

export function classed(name, classes, ...children) {
  const node = element(name, ...children);
  node.className = classes;
  return node;
}

export function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// `label` is what a screen reader says where the text alone says too little
export function button(text, work, label = null) {
  const node = classed("button", "quiet", text);
  node.type = "button";
  if (label) node.ariaLabel = label;
  node.addEventListener("click", work);
  return node;
}

export function copyButton(text, label = null) {
  const node = button("Copy", async () => {
    try {
      await navigator.clipboard.writeText(text());
      node.textContent = "Copied";
    } catch {
      node.textContent = "Not allowed here";
    }
    setTimeout(() => (node.textContent = "Copy"), 1500);
  }, label);
  return node;
}

export function read(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? fallback;
  } catch {
    return fallback;
  }
}

export function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch {
    // a browser without storage forgets; the page works all the same
  }
}

export const percent = (share) => `${(100 * share).toFixed(share > 0.0995 ? 0 : 1)} %`;

export function duration(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds) % 60} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}

const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
export const count = (number) => compact.format(number);
