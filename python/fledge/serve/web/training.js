// The run behind a model, also while it goes on: stages, curves, samples, time left. Asked of the
// server every few seconds as long as the panel is open.

import { $, button, classed, duration, element, svg } from "./dom.js";
import { get } from "./api.js";
import { update } from "./markdown.js";

const EVERY = 3000;
const WIDTH = 320;
const HEIGHT = 120;

export class Training {
  constructor() {
    Object.assign(this, { name: null, stage: null, timer: null });
    $("panelclose").addEventListener("click", () => this.close());
  }

  open(name) {
    if (this.name === name) return this.close();
    Object.assign(this, { name, stage: null });
    $("panel").hidden = false;
    $("training").ariaExpanded = "true";
    this.look();
    $("panelclose").focus();
  }

  close() {
    clearTimeout(this.timer);
    if (!this.name) return;
    this.name = null;
    $("panel").hidden = true;
    $("training").ariaExpanded = "false";
    $("training").focus();
  }

  async look() {
    clearTimeout(this.timer);
    const { name } = this;
    const path = `/runs/${encodeURIComponent(name)}`;
    try {
      const run = await get(path);
      const trained = run.stages.filter((s) => s.step !== null && s.status !== "waiting");
      const stage = this.stage ?? (trained.findLast((s) => s.status === "running") ?? trained.at(-1))?.stage;
      const detail = stage ? await get(`${path}/${stage}`) : null;
      if (name !== this.name) return; // closed meanwhile, or another's
      this.paint(run, trained, stage, detail);
      if (!run.running) return;
    } catch (error) {
      if (name !== this.name) return; // closed meanwhile, or another's
      $("panelstate").textContent = error.message;
    }
    this.timer = setTimeout(() => this.look(), EVERY);
  }

  paint(run, trained, stage, detail) {
    const left = run.seconds_left === null ? "" : `, about ${duration(run.seconds_left)} left`;
    const whole = run.stages.every((s) => s.status === "done");
    $("panelstate").textContent = `${run.name}: ${run.running ? `training now${left}` : whole ? "finished" : "not running"}.`;
    $("panelstages").replaceChildren(...run.stages.map((s) => {
      const steps = s.step === null ? "" : `step ${s.step}`;
      const time = s.eta ? `${duration(s.eta)} left` : s.seconds ? duration(s.seconds) : "";
      const item = element("li", element("strong", s.stage), ` ${[s.status, steps, time].filter(Boolean).join(", ")}`);
      item.className = s.status;
      return item;
    }));
    const focused = document.activeElement?.parentNode === $("paneltabs") ? document.activeElement.textContent : null;
    $("paneltabs").replaceChildren(...trained.map((s) => {
      const tab = button(s.stage, () => {
        this.stage = s.stage;
        this.look();
      });
      tab.ariaPressed = s.stage === stage;
      return tab;
    }));
    [...$("paneltabs").children].find((tab) => tab.textContent === focused)?.focus();
    $("panelcurves").replaceChildren(...Object.entries(detail?.curves ?? {}).map(([name, points]) => curve(name, points)));
    update($("panelsamples"), (detail?.samples || "No samples yet.").replace(/^# .*\n/, ""));
  }
}

function curve(name, points) {
  const xs = points.map(([x]) => x);
  const ys = points.map(([, y]) => y);
  const [left, right] = [xs[0], xs.at(-1)];
  const [low, high] = [Math.min(...ys), Math.max(...ys)];
  const x = (value) => 2 + ((WIDTH - 4) * (value - left)) / (right - left || 1);
  const y = (value) => HEIGHT - 4 - ((HEIGHT - 8) * (value - low)) / (high - low || 1);
  const label = `${name.replace("_", " ")}: ${ys.at(-1).toFixed(3)} at step ${right}`;
  const line = svg("polyline", { points: points.map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" ") });
  const dot = svg("circle", { cx: x(right), cy: y(ys.at(-1)), r: 3 });
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label }, line, dot);
  const range = `${low.toFixed(3)} to ${high.toFixed(3)}, steps ${left} to ${right}`;
  return element("figure", element("figcaption", element("strong", label)), picture, classed("p", "fine", range));
}
