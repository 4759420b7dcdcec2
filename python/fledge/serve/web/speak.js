// A screen reader gets whole sentences, not tokens: the live region is given each sentence once.

const ENDS = /[.!?:;](?=\s)|[\u3002\uff01\uff1f]|\n/g;

export class Speaker {
  constructor(region) {
    this.region = region;
    this.said = 0;
  }

  begin() {
    this.said = 0;
    this.region.textContent = "";
  }

  // `text` is the answer so far; `closing` comes at its end, after what is left of it
  feed(text, closing = "") {
    let stop = this.said;
    for (const mark of text.slice(this.said).matchAll(ENDS)) stop = this.said + mark.index + 1;
    const until = closing ? text.length : stop;
    const sentence = text.slice(this.said, until).replace(/[*`#|]+/g, "").trim();
    this.said = until;
    if (sentence || closing) this.region.textContent = `${sentence} ${closing}`.trim();
  }
}
