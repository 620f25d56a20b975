// Shows the Markdown of an answer, also while it is being written.

// Without `html: true` markup is shown as text. Images are shown as links: they would be loaded from other servers.
const markdown = globalThis.markdownit({ linkify: true, breaks: true }).disable("image");
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
markdown.validateLink = (url) => /^(https?:|mailto:)/i.test(url);
markdown.renderer.rules.link_open = (tokens, index, options, _, renderer) => {
  tokens[index].attrSet("target", "_blank");
  tokens[index].attrSet("rel", "noopener noreferrer nofollow");
  return renderer.renderToken(tokens, index, options);
};
// The alignment of a table's cell would be an inline style, which the page does not allow.
for (const rule of ["th_open", "td_open"]) {
  markdown.renderer.rules[rule] = (tokens, index, options, _, renderer) => {
    const token = tokens[index];
    const align = token.attrGet("style")?.split(":")[1];
    token.attrs = align ? [["class", align]] : null;
    return renderer.renderToken(tokens, index, options);
  };
}

/**
 * The text of one answer.
 *
 * A block (paragraph, list, code, ...) that is complete is drawn once and then left alone. Only the last two blocks
 * are drawn again: until a block has two after it, a next line can still change it.
 */
export class Markdown {
  #text = "";
  #drawn = 0; // so many characters are in complete blocks
  #frame = 0;

  constructor(element) {
    this.element = element;
    this.tail = document.createElement("div");
    this.tail.className = "tail";
    element.append(this.tail);
  }

  write(piece) {
    this.#text += piece;
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  /** Draws what is left. Should a late line have changed an early block, all is drawn anew. */
  finish() {
    cancelAnimationFrame(this.#frame);
    const whole = document.createElement("div");
    whole.append(drawn(this.#text));
    this.tail.remove();
    if (this.#text && this.element.innerHTML !== whole.innerHTML) {
      this.tail.replaceChildren(drawn(this.#text.slice(this.#drawn)));
      this.element.append(...this.tail.childNodes);
      if (this.element.innerHTML !== whole.innerHTML) this.element.replaceChildren(...whole.childNodes);
    }
  }

  #draw() {
    this.#frame = 0;
    const rest = this.#text.slice(this.#drawn);
    const complete = lengthWithoutLastTwoBlocks(rest);
    if (complete) this.tail.before(drawn(rest.slice(0, complete)));
    this.#drawn += complete;
    this.tail.replaceChildren(drawn(closed(rest.slice(complete))));
  }
}

function drawn(text) {
  const template = document.createElement("template");
  template.innerHTML = markdown.render(text);
  return template.content;
}

function lengthWithoutLastTwoBlocks(text) {
  const starts = markdown.parse(text, {}).filter(({ level, map, nesting }) => level === 0 && map && nesting >= 0);
  const line = starts.at(-2)?.map[0] ?? 0;
  return text.split("\n", line).reduce((length, { length: more }) => length + more + 1, 0);
}

/** Closes what the end of an unfinished text has opened, so that no signs flash up and vanish again. */
function closed(text) {
  // A last line of signs may become a list, a heading, a fence or a table.
  text = text.replace(/(^|\n)[ \t]*(?:[-=*+_#>`~|:. \t]+|\d+[.)]?)$/, "$1");
  if ((text.match(/^ {0,3}(```|~~~)/gm)?.length ?? 0) % 2) return text; // in a block of code
  text = text.replace(/\[([^\[\]\n]*)(?:\](?:\([^()\s]*)?)?$/, "$1"); // a link, until its address is there
  text = text.replace(/[*_~`]+$/, "");
  const [last] = text.split(/\n\s*\n/).slice(-1);
  if ((last.match(/`/g)?.length ?? 0) % 2) return `${text}\``;
  for (const sign of ["**", "~~"]) {
    if (last.split(sign).length % 2 === 0) text += sign;
  }
  return text;
}
