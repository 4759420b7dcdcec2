// Simple TeX as MathML: fractions, roots, scripts, Greek, operators, functions, brackets, accents.
// Whatever is not known makes `mathNode` return null, and the text is shown as it was written.

const NS = "http://www.w3.org/1998/Math/MathML";
const LONGEST = 2000;
const DEPTH = 20;

const GREEK = ("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho varsigma sigma tau " +
  "upsilon phi chi psi omega").split(" "); // as Unicode orders them
const LETTER = new Map([
  ...GREEK.flatMap((name, i) => [
    [name, String.fromCharCode(0x3b1 + i)], [name[0].toUpperCase() + name.slice(1), String.fromCharCode(0x391 + i)]]),
  ...table("varphi:\u03c6 infty:\u221e emptyset:\u2205 partial:\u2202 nabla:\u2207"),
]);
const SIGN = table("times:× cdot:⋅ div:÷ pm:± le:≤ leq:≤ ge:≥ geq:≥ ne:≠ neq:≠ approx:≈ equiv:≡ sim:∼ to:→ " +
  "rightarrow:→ leftarrow:← Rightarrow:⇒ iff:⇔ in:∈ notin:∉ subset:⊂ subseteq:⊆ cup:∪ cap:∩ forall:∀ exists:∃ neg:¬ " +
  "land:∧ lor:∨ sum:∑ prod:∏ int:∫ ldots:… dots:… cdots:⋯ circ:∘ langle:⟨ rangle:⟩ lfloor:⌊ rfloor:⌋");
const LARGE = new Set(["sum", "prod", "lim", "max", "min"]);
const FUNCTIONS = new Set("sin cos tan arcsin arccos arctan sinh cosh tanh log ln exp lim max min det gcd arg".split(" "));
const ACCENTS = table("hat:^ bar:¯ vec:→ dot:˙ tilde:~ overline:¯");
const SPACES = { ",": ".2em", ";": ".3em", " ": ".3em", "!": "0em", quad: "1em" };
const STYLED = new Set(["text", "mathrm", "mathbf", "mathit", "textbf", "operatorname"]);
const BLACKBOARD = { R: "ℝ", N: "ℕ", Z: "ℤ", Q: "ℚ", C: "ℂ" };

function table(words) {
  return new Map(words.split(" ").map((word) => word.split(":")));
}

function made(name, ...children) {
  const node = document.createElementNS(NS, name);
  node.append(...children);
  return node;
}

const UNKNOWN = Symbol("unknown"); // no Error: a page of broken math must not pay for stack traces

export function mathNode(source, display) {
  if (!source.trim() || source.length > LONGEST) return null;
  try {
    const reader = new Reader(source);
    const row = reader.row(0, () => reader.over);
    const node = made("math", row);
    if (display) node.setAttribute("display", "block");
    node.ariaLabel = source.trim();
    return node;
  } catch (error) {
    if (error === UNKNOWN) return null;
    throw error;
  }
}

class Reader {
  constructor(source) {
    this.tokens = source.match(/\\[a-zA-Z]+|\\[^]|\d+(?:[.,]\d+)*|[^\s]|\s+/gu) ?? [];
    this.i = 0;
  }

  get over() {
    return this.i >= this.tokens.length;
  }

  skip() {
    while (/^\s/.test(this.tokens[this.i] ?? "")) this.i++;
  }

  row(depth, ends) {
    if (depth > DEPTH) throw UNKNOWN;
    const row = made("mrow");
    for (this.skip(); !ends(); this.skip()) {
      if (this.over) throw UNKNOWN;
      row.append(this.scripted(depth));
    }
    return row;
  }

  // one argument: {a group} or a single atom
  argument(depth) {
    this.skip();
    if (this.tokens[this.i] !== "{") return this.atom(depth + 1);
    this.i++;
    const row = this.row(depth + 1, () => this.tokens[this.i] === "}");
    this.i++;
    return row;
  }

  // the raw text of {a group}
  words() {
    this.skip();
    if (this.tokens[this.i++] !== "{") throw UNKNOWN;
    let text = "";
    while (this.tokens[this.i] !== "}") {
      const token = this.tokens[this.i++];
      if (token === undefined || token === "{") throw UNKNOWN;
      text += token.startsWith("\\") ? token.slice(1) : token;
    }
    this.i++;
    return text;
  }

  scripted(depth) {
    const name = this.tokens[this.i]?.slice(1);
    const base = this.atom(depth);
    let below = null;
    let above = null;
    for (this.skip(); !this.over; this.skip()) {
      const token = this.tokens[this.i];
      if (token === "_" && !below) {
        this.i++;
        below = this.argument(depth);
      } else if (token === "^" && !above) {
        this.i++;
        above = this.argument(depth);
      } else if (token === "'" && !above) {
        let primes = "";
        while (this.tokens[this.i] === "'") primes += this.tokens[this.i++] && "′";
        above = made("mo", primes);
      } else break;
    }
    const large = LARGE.has(name);
    if (below && above) return made(large ? "munderover" : "msubsup", base, below, above);
    if (below) return made(large ? "munder" : "msub", base, below);
    return above ? made(large ? "mover" : "msup", base, above) : base;
  }

  atom(depth) {
    const token = this.tokens[this.i++];
    if (token === undefined || token === "}" || token === "&" || token === "_" || token === "^") throw UNKNOWN;
    if (token === "{") {
      const row = this.row(depth + 1, () => this.tokens[this.i] === "}");
      this.i++;
      return row;
    }
    if (token.startsWith("\\")) return this.command(token.slice(1), depth);
    if (/^\d/.test(token)) return made("mn", token);
    if (/^\p{L}/u.test(token)) return made("mi", token);
    return made("mo", token === "-" ? "−" : token);
  }

  command(name, depth) {
    if (LETTER.has(name)) return made("mi", LETTER.get(name));
    if (SIGN.has(name)) return made("mo", SIGN.get(name));
    if (FUNCTIONS.has(name)) return made("mi", name);
    if (ACCENTS.has(name)) {
      const node = made("mover", this.argument(depth), made("mo", ACCENTS.get(name)));
      node.setAttribute("accent", "true");
      return node;
    }
    if (Object.hasOwn(SPACES, name)) {
      const node = made("mspace");
      node.setAttribute("width", SPACES[name]);
      return node;
    }
    if (STYLED.has(name)) return made(name.startsWith("text") ? "mtext" : "mi", this.words());
    if ("{}%$#_&|".includes(name)) return made("mo", name === "|" ? "∥" : name);
    switch (name) {
      case "frac":
        return made("mfrac", this.argument(depth), this.argument(depth));
      case "sqrt": {
        this.skip();
        if (this.tokens[this.i] !== "[") return made("msqrt", this.argument(depth));
        this.i++;
        const index = this.row(depth + 1, () => this.tokens[this.i] === "]");
        this.i++;
        return made("mroot", this.argument(depth), index);
      }
      case "mathbb": {
        const letter = this.words();
        if (!Object.hasOwn(BLACKBOARD, letter)) throw UNKNOWN;
        return made("mi", BLACKBOARD[letter]);
      }
      case "left": {
        const row = made("mrow", this.fence());
        row.append(this.row(depth + 1, () => this.tokens[this.i] === "\\right"));
        this.i++;
        row.append(this.fence());
        return row;
      }
      default:
        throw UNKNOWN;
    }
  }

  fence() {
    this.skip();
    const token = this.tokens[this.i++];
    const sign = token === "." ? "" : token?.startsWith("\\") ? (SIGN.get(token.slice(1)) ?? token[1]) : token;
    if (sign === undefined || !/^[()[\]{}|⟨⟩⌊⌋⌈⌉]?$/.test(sign)) throw UNKNOWN;
    const node = made("mo", sign);
    node.setAttribute("stretchy", "true");
    return node;
  }
}
