// How text is drawn, as the form says it, in the words of the routes; and what this browser remembers of the page.

const NUMBERS = ["temperature", "top_p", "min_p", "repetition_penalty", "top_k", "max_tokens", "seed"];

/** This browser's memory of the page, as far as it gives one. The key is no part of it. */
export const memory = {
  get(name, otherwise) {
    try {
      return JSON.parse(localStorage.getItem(`smolforge.${name}`)) ?? otherwise;
    } catch {
      return otherwise;
    }
  },
  set(name, value) {
    try {
      localStorage.setItem(`smolforge.${name}`, JSON.stringify(value));
    } catch {
      // Full, or forbidden: the page works without.
    }
  },
};

export class Controls {
  constructor(form) {
    this.form = form;
    for (const [name, value] of Object.entries(memory.get("controls", {}))) {
      if (form.elements[name]) form.elements[name].value = value;
    }
    form.addEventListener("input", (event) => this.#changed(event.target));
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(() => this.#changed()));
    this.#changed();
  }

  /** The fields of a request. What is empty is left to the server. */
  get request() {
    const given = {};
    for (const name of NUMBERS) {
      const { value } = this.form.elements[name];
      if (value !== "") given[name] = Number(value);
    }
    const stop = this.form.elements.stop.value.split("\n").filter(Boolean).map(unescaped);
    return stop.length ? { ...given, stop } : given;
  }

  get system() {
    return this.form.elements.system.value.trim();
  }

  #changed(field) {
    if (field?.dataset.of) this.form.elements[field.dataset.of].value = field.value;
    for (const slider of this.form.querySelectorAll("[data-of]")) {
      slider.value = this.form.elements[slider.dataset.of].value || slider.defaultValue;
      slider.style.setProperty("--at", (slider.value - slider.min) / (slider.max - slider.min));
    }
    const values = [...NUMBERS, "stop", "system"].map((name) => [name, this.form.elements[name].value]);
    memory.set("controls", Object.fromEntries(values));
  }
}

function unescaped(text) {
  return text.replace(/\\([nt\\])/g, (_, letter) => ({ n: "\n", t: "\t", "\\": "\\" })[letter]);
}
