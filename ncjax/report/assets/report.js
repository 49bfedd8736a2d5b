/* Draws the report: the grid of runs that chooses, curves, and tables. Names in the data reach the
   page as text alone: by textContent, or by ECharts' own texts, which are SVG text. */
"use strict";
(async () => {
  const byId = (id) => document.getElementById(id);
  const page = JSON.parse(byId("page").textContent);
  const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"];
  // Viridis without its ends, which thin lines do not show on paper or on a dark page.
  const VIRIDIS = ["#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b"];
  const ON_DARK = ["#7f6fd0", "#6a8fe0", "#4fa9d8", "#3fbfc4", "#3ccf9f", "#6ddc7a", "#a8e356", "#e0e34a"];
  const DIVERGING = ["#b35806", "#f1a340", "#f7f7f7", "#998ec3", "#542788"];
  const TITLE_HEIGHT = 24;
  // More curves than this have no bands, no marks, and no common tooltip.
  const MANY = 12;
  // More take seconds to draw, and nobody tells them apart.
  const MOST_CURVES = 120;
  const lambda = (name) => ({weight_decay: "\u03bb", relaxation_time: "2 \u03bb t"}[name] || name);

  async function inflate(base64) {
    const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }

  /* The history of one WORKDIR. A run is an index into its grid, the last axis fastest. */
  class Source {
    constructor(described, numbers) {
      Object.assign(this, described);
      this.sizes = Object.fromEntries(Object.entries(this.coordinates).map(([k, v]) => [k, v.length]));
      this.sizes.epoch = this.epochs.length;
      for (const axis of this.axes) this.sizes[axis.name] = axis.labels.length;
      this.runs = this.axes.reduce((product, axis) => product * axis.labels.length, 1);
      this.places = Array.from({length: this.runs}, (_, run) => this.placeOf(run));
      this.numbers = numbers;
      this.epoch = this.epochs.length - 1;
      this.selected = new Set(this.places.keys());
      for (const variable of Object.values(this.variables)) {
        variable.strides = {};
        let stride = 1;
        for (const dim of [...variable.dims].reverse()) {
          variable.strides[dim] = stride;
          stride *= this.sizes[dim];
        }
      }
    }

    placeOf(run) {
      const place = {};
      for (const axis of [...this.axes].reverse()) {
        place[axis.name] = run % axis.labels.length;
        run = Math.floor(run / axis.labels.length);
      }
      return place;
    }

    has(name) { return name in this.variables; }

    depends(name, dim) { return this.has(name) && this.variables[name].dims.includes(dim); }

    /* One number; `at` gives indices of what is not an axis: epoch, split, layer, mode, label. */
    value(name, run, at) {
      if (!this.has(name)) return NaN;
      let index = 0;
      for (const [dim, stride] of Object.entries(this.variables[name].strides)) {
        index += stride * (this.places[run][dim] ?? at[dim] ?? 0);
      }
      return this.numbers[name][index];
    }

    label(run, without = []) {
      return this.axes
        .filter((axis) => !without.includes(axis.name) && axis.labels.length > 1)
        .map((axis) => `${lambda(axis.name)} = ${axis.labels[this.places[run][axis.name]]}`)
        .join(", ");
    }

    /* Runs that differ in their seed alone, of those that are selected, in order. */
    settings(runs = this.selected) {
      const groups = new Map();
      for (const run of [...runs].sort((a, b) => a - b)) {
        const key = this.axes.filter((a) => a.name !== "seed").map((a) => this.places[run][a.name]).join();
        groups.set(key, [...(groups.get(key) || []), run]);
      }
      return [...groups.values()];
    }
  }

  async function unpack() {
    const packed = JSON.parse(byId("numbers").textContent);
    return Promise.all(page.sources.map(async (described, i) => {
      const entries = Object.entries(packed[i]).map(async ([name, base64]) => {
        const buffer = await inflate(base64);
        const single = described.variables[name].dtype === "<f4";
        return [name, single ? new Float32Array(buffer) : new Float64Array(buffer)];
      });
      return new Source(described, Object.fromEntries(await Promise.all(entries)));
    }));
  }

  const sources = await unpack();
  const several = sources.length > 1;
  const state = {metric: "", focus: {source: 0, run: page.sources[0].focus}};
  // Several WORKDIRs are compared at their most collapsed settings first.
  if (several) for (const source of sources) source.selected = new Set(seedsOf(source, source.focus));

  function seedsOf(source, run) {
    return source.settings(source.places.keys()).find((group) => group.includes(run));
  }

  // ---- numbers and words

  const finite = (values) => values.filter(Number.isFinite);
  const extent = (values) => values.reduce(([low, high], x) => [Math.min(low, x), Math.max(high, x)], [Infinity, -Infinity]);
  const mean = (values) => values.reduce((sum, x) => sum + x, 0) / values.length;
  function short(x, digits = 4) {
    if (Number.isNaN(x)) return "\u2013";
    if (!Number.isFinite(x)) return x > 0 ? "\u221e" : "\u2212\u221e";
    const size = Math.abs(x);
    const text = size && (size < 1e-3 || size >= 1e6) ? x.toExponential(digits - 1) : x.toPrecision(digits);
    return text.replace(/(\.\d*?)0+(e|$)/, "$1$2").replace(/\.(e|$)/, "$1").replace("e+", "e");
  }
  const title = (name) => page.metrics[name].title;
  const definition = (name) => `${name}: ${page.metrics[name].definition}`;
  const splits = (source, name) => {
    if (!source.depends(name, "split")) return [0];
    return {train: [0], test: [1], both: [0, 1]}[byId("split").value];
  };

  function element(tag, properties = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in made) made[name] = value;
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    return {
      ink: colour("ink"), soft: colour("soft"), line: colour("line"), paper: colour("paper"),
      scale: style.colorScheme.includes("dark") ? ON_DARK : VIRIDIS,
    };
  }

  // ---- the grid

  /* Position of values between 0 and 1, by logarithm where all are positive. */
  function scaled(values) {
    const known = finite(values);
    const map = extent(known)[0] > 0 ? Math.log : (x) => x;
    const [low, high] = extent(known).map(map);
    return values.map((x) => Number.isFinite(x) ? (high > low ? (map(x) - low) / (high - low) : 0.5) : NaN);
  }

  function drawGrids() {
    const holder = byId("grids");
    holder.replaceChildren(...sources.map((source) => {
      const table = element("table", {className: "grid"});
      const parts = [element("div", {className: "scroll"}, table)];
      if (several) parts.unshift(element("h3", {textContent: source.name}));
      parts.push(epochControl(source));
      fillGrid(source, table);
      source.table = table;
      return element("div", {}, ...parts);
    }));
    markSelected();
  }

  function epochControl(source) {
    const words = element("output");
    const slider = element("input", {
      type: "range", min: 0, max: source.epochs.length - 1, value: source.epoch,
      "aria-label": `measured epoch${several ? ` of ${source.name}` : ""}`,
    });
    const say = () => { words.textContent = `epoch ${source.epochs[source.epoch]}`; };
    slider.addEventListener("input", () => {
      source.epoch = Number(slider.value);
      say();
      fillGrid(source, source.table);
      markSelected();
      drawFinals();
    });
    say();
    return element("div", {className: "controls"}, element("label", {}, "at", slider, words));
  }

  function fillGrid(source, table) {
    const [rows, ...columns] = source.axes;
    const width = source.runs / rows.labels.length;
    const name = state.metric;
    const split = splits(source, name)[0];
    const values = [...source.places.keys()].map((run) => source.value(name, run, {epoch: source.epoch, split}));
    const positions = scaled(values);
    const which = source.depends(name, "split") ? `, ${source.coordinates.split[split]}` : "";
    const caption = `${title(name)}${which}`;
    table.setAttribute("aria-label", `${caption}, by ${source.axes.map((a) => a.name).join(" and ")}`);
    const head = columns.filter((axis) => axis.labels.length > 1).map((axis) => {
      const after = columns.slice(columns.indexOf(axis) + 1).reduce((n, a) => n * a.labels.length, 1);
      const cells = Array.from({length: width / after}, (_, i) => {
        const runs = [...source.places.keys()].filter((run) => Math.floor((run % width) / after) === i);
        return element("th", {colSpan: after, scope: "col"}, chooser(source, runs, axis.labels[i % axis.labels.length]));
      });
      return element("tr", {}, element("th", {className: "corner", textContent: lambda(axis.name)}), ...cells);
    });
    const corner = element("th", {className: "corner", textContent: `${lambda(rows.name)}  \\  ${caption}`, title: definition(name)});
    if (head.length) head[0].firstChild.replaceWith(element("th", {
      className: "corner", title: definition(name),
      textContent: `${lambda(rows.name)} \\ ${head[0].firstChild.textContent}`,
    }));
    else head.push(element("tr", {}, corner, element("th", {textContent: caption})));
    const body = rows.labels.map((text, row) => {
      const runs = Array.from({length: width}, (_, i) => row * width + i);
      const cells = runs.map((run) => element("td", {}, cell(source, run, values[run], positions[run])));
      return element("tr", {}, element("th", {scope: "row"}, chooser(source, runs, text)), ...cells);
    });
    table.replaceChildren(element("thead", {}, ...head), element("tbody", {}, ...body));
  }

  function chooser(source, runs, text) {
    const button = element("button", {type: "button", textContent: text, title: `draws these ${runs.length} runs`});
    button.addEventListener("click", (event) => choose(source, runs, event));
    return button;
  }

  function cell(source, run, value, position) {
    const button = element("button", {
      type: "button", textContent: short(value, 3), title: `${source.label(run)}\n${state.metric} = ${value}`,
    });
    button.dataset.run = run;
    button.dataset.value = value;
    button.setAttribute("aria-label", `${source.label(run)}: ${short(value, 3)}`);
    if (Number.isFinite(position)) {
      const colour = echarts.color.lerp(position, VIRIDIS);
      button.style.background = colour;
      button.style.color = echarts.color.lum(colour, 1) > 0.45 ? "#000" : "#fff";
    }
    button.addEventListener("click", (event) => choose(source, [run], event));
    return button;
  }

  /* Draws some runs alone, or adds or removes them; all of them where they were alone already. */
  function choose(source, runs, event) {
    const drawn = runs.every((run) => source.selected.has(run));
    if (event.ctrlKey || event.shiftKey || event.metaKey) {
      for (const run of runs) if (drawn) source.selected.delete(run); else source.selected.add(run);
    } else if (drawn && source.selected.size === runs.length) {
      source.selected = new Set(source.places.keys());
    } else {
      source.selected = new Set(runs);
    }
    state.focus = {source: sources.indexOf(source), run: runs[0]};
    markSelected();
    drawAll();
  }

  function markSelected() {
    for (const source of sources) {
      for (const button of source.table.querySelectorAll("button[data-run]")) {
        const drawn = source.selected.has(Number(button.dataset.run));
        button.classList.toggle("drawn", drawn && source.selected.size < source.runs);
        button.setAttribute("aria-pressed", drawn);
      }
    }
  }

  // ---- charts

  const charts = new Map();
  function chartOf(holder) {
    if (!charts.has(holder)) {
      const chart = echarts.init(holder, null, {renderer: "svg"});
      new ResizeObserver(() => chart.resize()).observe(holder);
      // On paper a chart is as wide as its column there, whatever its width on the screen.
      chart.on("rendered", () => holder.querySelector("svg").setAttribute("viewBox", `0 0 ${chart.getWidth()} ${chart.getHeight()}`));
      charts.set(holder, chart);
    }
    return charts.get(holder);
  }

  /* What every chart has: a title that hovers its definition, texts in the colours of the page. */
  function frame(heading, words) {
    const {ink} = theme();
    return {
      animation: false,
      aria: {enabled: true, label: {description: words}},
      textStyle: {fontFamily: "inherit", color: ink},
      title: {
        text: heading, left: 0, top: 0, textStyle: {fontSize: 13, fontWeight: 600, color: ink},
      },
      grid: {left: 62, right: 18, top: 34, bottom: 46},
    };
  }

  function put(holder, option, hover) {
    const chart = chartOf(holder);
    // The browser shows a definition over the title alone: over data stands the tooltip of ECharts,
    // whose own events of a title do not come in Chromium 156.
    holder.onmousemove = (event) => {
      if (event.clientY - holder.getBoundingClientRect().top < TITLE_HEIGHT) holder.title = hover;
      else holder.removeAttribute("title");
    };
    Object.assign(option.title.textStyle, {width: holder.clientWidth - 12, overflow: "truncate"});
    chart.setOption(option, true);
  }

  function axis(name, log, more = {}) {
    const {soft, line} = theme();
    return {
      type: log ? "log" : "value", name, nameLocation: "middle", nameGap: 28,
      nameTextStyle: {color: soft}, axisLabel: {color: soft, formatter: (x) => short(x, 3), hideOverlap: true},
      axisLine: {lineStyle: {color: line}}, splitLine: {lineStyle: {color: line, opacity: 0.5}},
      scale: true, ...more,
    };
  }

  function legendBelowTitle() {
    const {ink, soft} = theme();
    return {
      grid: {left: 62, right: 18, top: 58, bottom: 46},
      legend: {
        type: "scroll", top: 22, left: 0, textStyle: {color: ink, fontSize: 11}, itemWidth: 18, itemHeight: 8, itemGap: 7,
        pageTextStyle: {color: soft}, pageIconColor: ink, pageIconInactiveColor: soft,
      },
    };
  }

  /* Limits of a logarithmic axis: 1, 2 or 5 times a power of ten, where ECharts takes whole decades. */
  function reach(values) {
    if (!values.length) return {};
    const decade = (x) => 10 ** Math.floor(Math.log10(x));
    const [low, high] = extent(values);
    const below = [5, 2, 1].find((k) => k * decade(low) <= low * 1.001) * decade(low);
    const above = [1, 2, 5, 10].find((k) => k * decade(high) >= high * 0.999) * decade(high);
    return {min: below, max: above > below ? above : 2 * above};
  }

  function tooltip(trigger, rows) {
    const {paper, ink, line} = theme();
    return {
      trigger, confine: true, backgroundColor: paper, borderColor: line, textStyle: {color: ink},
      axisPointer: {type: "line"},
      formatter: (shown) => {
        const tip = element("div", {className: "tip"});
        for (const [left, right] of rows(Array.isArray(shown) ? shown : [shown])) {
          tip.append(element("div", {}, element("span", {textContent: left}), element("b", {textContent: right})));
        }
        return tip;
      },
    };
  }

  /* Curves of (x, mean, least, greatest). On a logarithmic axis what is not above 0 is left out. */
  function drawLines(holder, name, heading, curves, {xName, xLog, yLog, categories, named = false}) {
    const visible = ([x, y]) => Number.isFinite(y) && (categories || (Number.isFinite(x) && (!xLog || x > 0)));
    const shown = curves.flatMap((curve) => curve.points.filter(visible));
    const drawn = shown.map((point) => point[1]);
    // Decades say nothing of a share that goes to 1, as accuracy does.
    const wanted = yLog && !(page.metrics[name]?.most === 1 && page.metrics[name].best !== 0);
    const logarithmic = wanted && drawn.length > 0 && drawn.every((y) => y > 0);
    const remark = wanted && !logarithmic && drawn.length ? "linear: it reaches 0" : "";
    const marks = curves.length <= MANY;
    const series = curves.flatMap((curve) => {
      const points = curve.points.filter(visible);
      const line = {
        type: "line", name: curve.label, data: points.map(([x, y]) => [x, y]), color: curve.colour,
        lineStyle: {width: 1.6, type: curve.dash || "solid"}, symbol: "circle", symbolSize: 5,
        showSymbol: marks || points.length === 1, emphasis: {focus: "none"},
      };
      const spread = points.filter(([, , low]) => !logarithmic || low > 0);
      const isBand = marks && !categories && spread.some(([, , low, high]) => high > low);
      return isBand ? [band(curve, spread), line] : [line];
    });
    const {soft} = theme();
    const ends = curves.slice(0, MANY).map((curve) => {
      const last = curve.points.filter(visible).at(-1);
      return last ? `${curve.label} ends at ${short(last[1])}` : `${curve.label} has no value`;
    });
    const heights = marks && !categories ? shown.flatMap((point) => point.slice(1).filter((y) => y > 0)) : drawn;
    const most = page.metrics[name]?.most;
    const ceiling = most && drawn.length && extent(drawn)[1] > 0.7 * most ? {max: most} : {};
    put(holder, {
      ...frame(heading, `${heading} against ${xName}: ${ends.join("; ")}`),
      xAxis: categories
        ? {...axis(xName, false), type: "category", data: categories, axisLabel: {color: soft}}
        : axis(xName, xLog, xLog ? reach(shown.map((point) => point[0])) : {}),
      yAxis: axis("", logarithmic, logarithmic ? reach(heights) : ceiling),
      ...(named ? legendBelowTitle() : {}),
      tooltip: tooltip(!categories && (curves.length > MANY || xName !== "epoch") ? "item" : "axis", (hovered) => {
        const of = hovered.filter((one) => one.seriesType === "line");
        if (!of.length) return [];
        return [[xName, categories ? of[0].name : short(of[0].value[0])],
          ...of.map((one) => [one.seriesName, short(one.value[1], 5)])];
      }),
      graphic: [
        {type: "text", right: 18, top: 4, style: {text: remark, fill: soft, fontSize: 11}},
        ...(shown.length ? [] : [{type: "text", left: "center", top: "middle", style: {text: "no number here", fill: soft}}]),
      ],
      series,
    }, name in page.metrics ? definition(name) : "");
  }

  function band(curve, points) {
    return {
      type: "custom", silent: true, z: 1, color: curve.colour,
      data: points.map(([x, , low, high]) => [x, low, high]), encode: {x: 0, y: [1, 2]},
      tooltip: {show: false},
      renderItem: (parameters, api) => {
        if (parameters.dataIndex > 0) return null;
        const low = points.map(([x, , y]) => api.coord([x, y]));
        const high = points.map(([x, , , y]) => api.coord([x, y])).reverse();
        return {type: "polygon", shape: {points: [...low, ...high]}, style: {fill: curve.colour, opacity: 0.16}};
      },
    };
  }

  const chosen = () => sources.flatMap((source) => source.settings().map((runs) => ({source, runs})));

  /* Of many things some, evenly chosen, both ends among them. */
  const evenly = (things, most) => (things.length <= most ? things
    : Array.from({length: most}, (_, i) => things[Math.round(i * (things.length - 1) / (most - 1))]));

  /* The groups that are drawn, each with a label and a look. */
  function groups() {
    const made = evenly(chosen(), MOST_CURVES);
    const {ink, scale} = theme();
    // Colours run along lambda where one WORKDIR is drawn; a single curve at 0 has none of them.
    const isZero = ({source, runs}) => {
      const first = source.axes[0];
      return first.name === "weight_decay" && first.labels[source.places[runs[0]][first.name]] === "0";
    };
    const atZero = made.filter(isZero);
    const coloured = made.filter((group) => atZero.length > 1 || !isZero(group));
    for (const [i, group] of made.entries()) {
      const {source, runs} = group;
      const words = source.label(runs[0], runs.length > 1 ? ["seed"] : []);
      group.label = [several ? source.name : "", words].filter(Boolean).join(": ") || source.name;
      const at = coloured.indexOf(group);
      if (atZero.length < made.length && isZero(group)) group.dash = "dashed";
      if (several && made.length <= COLOURS.length) group.colour = COLOURS[i];
      else if (at < 0) group.colour = ink;
      else group.colour = echarts.color.lerp(coloured.length > 1 ? at / (coloured.length - 1) : 0.5, scale);
    }
    return made;
  }

  function pointsOf({source, runs}, name, at) {
    const clock = byId("clock").value;
    return source.epochs.map((epoch, i) => {
      const values = finite(runs.map((run) => source.value(name, run, {...at, epoch: i})));
      const times = clock === "epoch" ? [epoch] : finite(runs.map((run) => source.value(clock, run, {epoch: i})));
      return values.length ? [mean(times), mean(values), ...extent(values)] : [epoch, NaN];
    });
  }

  function scales() {
    const clock = byId("clock");
    return {
      xName: clock.options[clock.selectedIndex].text,
      xLog: byId("x-scale").value === "log", yLog: byId("y-scale").value === "log",
    };
  }

  function drawMetric(holder, name, at = {}, suffix = "") {
    const curves = groups().flatMap((group) => splits(group.source, name).map((split) => ({
      ...group, label: group.label + (split ? ", test" : ""), dash: split && byId("split").value === "both" ? "dotted" : group.dash,
      points: pointsOf(group, name, {...at, split}),
    })));
    drawLines(holder, name, title(name) + suffix, curves, scales());
  }

  function drawLegend() {
    const made = groups();
    byId("legend").replaceChildren(...made.map((group) => {
      const item = element("li");
      const swatch = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      swatch.setAttribute("width", "26");
      swatch.setAttribute("height", "8");
      swatch.setAttribute("aria-hidden", "true");
      const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
      const dash = {dashed: "6 4", dotted: "2 3"}[group.dash] || "none";
      for (const [key, value] of Object.entries({x1: 0, x2: 26, y1: 4, y2: 4, stroke: group.colour, "stroke-width": 3, "stroke-dasharray": dash})) {
        line.setAttribute(key, value);
      }
      swatch.append(line);
      item.append(swatch, group.label);
      return item;
    }));
    const most = Math.max(0, ...made.map((group) => group.runs.length));
    const spread = most > 1 ? `Curves are means over up to ${most} seeds${made.length <= MANY ? "; bands go from the least to the greatest" : ""}. ` : "";
    const dotted = byId("split").value === "both" ? "Dotted: test. " : "";
    const count = chosen().length;
    const some = made.length < count ? `${made.length} of ${count} curves, evenly chosen; the grid draws any other. ` : "";
    byId("spread").textContent = some + spread + dotted;
  }

  function drawPanels() {
    drawLegend();
    for (const holder of byId("panels").children) drawMetric(holder, holder.dataset.metric);
    drawAny();
  }

  function drawAny() {
    const [name, dim, index] = byId("any-metric").value.split("|");
    const suffix = dim ? `, ${anyLabel(dim, Number(index))}` : "";
    drawMetric(byId("any"), name, dim ? {[dim]: Number(index)} : {}, suffix);
  }

  const anyLabel = (dim, index) => {
    const of = sources.find((source) => source.coordinates[dim] && index < source.coordinates[dim].length);
    return of ? of.coordinates[dim][index] : `${index}`;
  };

  /* Settings in focus along the first axis: the other axes stand where the run in focus does. */
  function alongFirstAxis() {
    const source = sources[state.focus.source];
    const first = source.axes[0];
    const place = source.places[state.focus.run];
    const others = source.axes.slice(1).filter((axis) => axis.name !== "seed");
    return first.labels.map((_, i) => [...source.places.keys()].filter((run) => (
      source.places[run][first.name] === i && others.every((axis) => source.places[run][axis.name] === place[axis.name]))));
  }

  function meanAt(source, name, runs, at) {
    const values = finite(runs.map((run) => source.value(name, run, {...at, epoch: source.epoch})));
    return values.length ? mean(values) : NaN;
  }

  function drawPredictions() {
    const source = sources[state.focus.source];
    const along = alongFirstAxis();
    const first = source.axes[0];
    const {ink} = theme();
    for (const holder of byId("predictions").children) {
      const {measured, predicted} = page.predictions[holder.dataset.index];
      // The panel's title says of what.
      const role = (name) => (title(name).startsWith(`${title(measured)} of`)
        ? title(name).slice(title(measured).length + 1)
        : title(name).replace(/^(bound|floor) (on|of) (the )?(.*?)( by .*)?$/, "$1$5"));
      const curve = (name, i) => ({
        label: i ? role(name) : "measured", colour: i ? COLOURS[(i - 1) % COLOURS.length] : ink, dash: i ? "dashed" : "solid",
        points: along.map((runs, x) => [x, meanAt(source, name, runs, {split: splits(source, name)[0]})]),
      });
      const curves = [measured, ...predicted].filter((name) => source.has(name)).map(curve);
      drawLines(holder, measured, title(measured), curves, {
        xName: lambda(first.name), categories: first.labels, yLog: byId("y-scale").value === "log", named: true,
      });
    }
  }

  function drawCauses() {
    for (const holder of byId("causes").children) drawStack(holder, page.causes[holder.dataset.index]);
  }

  function drawStack(holder, wanted) {
    const source = sources[state.focus.source];
    const names = wanted.filter((name) => source.has(name));
    holder.hidden = !names.length;
    if (!names.length) return;
    const along = alongFirstAxis();
    const {soft} = theme();
    const series = names.map((name, i) => ({
      type: "bar", stack: "shares", stackStrategy: "samesign", name: title(name).split(": ").at(-1).replace("share of ", ""), color: COLOURS[i % COLOURS.length],
      barMaxWidth: 60, data: along.map((runs) => { const x = meanAt(source, name, runs, {}); return Number.isFinite(x) ? x : null; }),
    }));
    const heading = `${title(names[0]).split(": ")[0]}, shares at epoch ${source.epochs[source.epoch]}`;
    const words = series.map((one) => `${one.name} ${one.data.map((x) => x === null ? "none" : short(x, 2)).join(", ")}`).join("; ");
    put(holder, {
      ...frame(heading, `${heading}, stacked by ${source.axes[0].name}: ${words}`),
      ...legendBelowTitle(),
      xAxis: {...axis(lambda(source.axes[0].name), false), type: "category", data: source.axes[0].labels, axisLabel: {color: soft}},
      yAxis: axis("", false, {scale: false}),
      tooltip: tooltip("axis", (shown) => [[lambda(source.axes[0].name), shown[0].name], ...shown.map((one) => [one.seriesName, short(one.value)])]),
      series,
    }, names.map(definition).join("\n"));
  }

  function drawFocus() {
    const source = sources[state.focus.source];
    const {run} = state.focus;
    const {scale} = theme();
    byId("focus").textContent = `In focus: ${[several ? source.name : "", source.label(run)].filter(Boolean).join(": ") || source.name}. The grid above chooses it.`;
    const along = (count, i) => echarts.color.lerp(count > 1 ? i / (count - 1) : 0.5, scale);
    const by = (dim, holder, name) => {
      const labels = source.coordinates[dim];
      const curves = labels.map((text, i) => ({
        label: dim === "mode" ? `mode ${text}` : text, colour: along(labels.length, i),
        points: pointsOf({source, runs: [run]}, name, {[dim]: i}),
      }));
      drawLines(holder, name, `${title(name)} by ${dim}`, curves, {...scales(), named: true});
    };
    const layered = byId("layer-metric").value;
    byId("layers-part").hidden = !source.depends(layered, "layer") || source.axes[0].name === "layer";
    if (!byId("layers-part").hidden) by("layer", byId("layers"), layered);
    const modes = "mode_eigenvalues";
    byId("modes-part").hidden = !source.has(modes);
    if (source.has(modes)) by("mode", byId("modes"), modes);
    drawCosines(source, run);
  }

  function drawCosines(source, run) {
    const name = "class_mean_cosine";
    byId("cosines-part").hidden = !source.has(name);
    if (!source.has(name)) return;
    const labels = source.coordinates.label;
    const etf = -1 / (labels.length - 1);
    const data = [];
    let reach = 0.01;
    for (let i = 0; i < labels.length; i++) for (let j = 0; j < labels.length; j++) {
      if (i === j) continue;
      const x = source.value(name, run, {label: i, other_label: j});
      if (!Number.isFinite(x)) continue;
      reach = Math.max(reach, Math.abs(x - etf));
      data.push([j, i, x]);
    }
    const {soft, ink} = theme();
    const category = {type: "category", data: labels, axisLabel: {color: soft, hideOverlap: true}, splitArea: {show: false}};
    const heading = `Cosines of class means; ETF: ${short(etf, 3)}`;
    put(byId("cosines"), {
      ...frame(heading, `${heading}. The furthest is ${short(reach, 3)} away.`),
      grid: {left: 50, right: 104, top: 34, bottom: 40},
      xAxis: category, yAxis: {...category, inverse: true},
      visualMap: {
        min: etf - reach, max: etf + reach, calculable: true, right: 0, top: "center", itemHeight: 180, precision: 3,
        inRange: {color: DIVERGING}, textStyle: {color: ink}, formatter: (x) => short(x, 3),
      },
      tooltip: tooltip("item", ([one]) => [[`${labels[one.value[1]]} and ${labels[one.value[0]]}`, short(one.value[2])]]),
      series: [{type: "heatmap", data}],
    }, definition(name));
  }

  function drawParallel() {
    const wide = (source) => source.axes.filter((axis) => axis.labels.length > 1).length > 2;
    const source = [sources[state.focus.source], ...sources].find(wide);
    byId("parallel-section").hidden = !source;
    if (!source) return;
    const axes = source.axes.filter((axis) => axis.labels.length > 1);
    const names = page.panels.filter((name) => source.has(name));
    const runs = [...source.selected];
    const value = (name, run) => source.value(name, run, {epoch: source.epoch, split: splits(source, name)[0]});
    const {soft, ink, line, scale} = theme();
    const look = {nameTextStyle: {color: ink}, axisLabel: {color: soft, formatter: (x) => (typeof x === "number" ? short(x, 3) : x)}, axisLine: {lineStyle: {color: line}}};
    const heading = `${source.name}, epoch ${source.epochs[source.epoch]}`;
    const numbers = names.map((name, i) => {
      const positive = finite(runs.map((run) => value(name, run))).every((x) => x > 0);
      return {...look, dim: axes.length + i, name: title(name), type: positive ? "log" : "value", scale: true, nameRotate: 20};
    });
    const colourBy = runs.map((run) => value(page.panels[0], run));
    const positions = scaled(colourBy);
    put(byId("parallel"), {
      ...frame(heading, `${runs.length} runs over ${axes.map((a) => a.name).join(", ")} and ${names.join(", ")}`),
      parallel: {left: 50, right: 80, top: 100, bottom: 30},
      parallelAxis: [...axes.map((axis, i) => ({...look, dim: i, name: lambda(axis.name), type: "category", data: axis.labels, nameRotate: 20})), ...numbers],
      series: [{
        type: "parallel", lineStyle: {width: 1.5, opacity: 0.6}, smooth: false,
        data: runs.map((run, i) => ({
          name: source.label(run),
          value: [...axes.map((axis) => axis.labels[source.places[run][axis.name]]), ...names.map((name) => value(name, run)).map((x) => Number.isFinite(x) ? x : "-")],
          lineStyle: {color: Number.isFinite(positions[i]) ? echarts.color.lerp(positions[i], scale) : soft},
        })),
      }],
    }, "");
  }

  // ---- tables

  /* Columns of the table: one for each number and split. */
  function columns() {
    const names = byId("every").checked ? Object.keys(page.metrics) : page.columns;
    return names.flatMap((name) => {
      const of = sources.find((source) => source.has(name));
      if (!of || of.variables[name].dims.some((dim) => ["mode", "label", "other_label"].includes(dim))) return [];
      const isLayered = of.depends(name, "layer") && of.axes[0].name !== "layer";
      if (isLayered) return of.coordinates.layer.map((text, layer) => ({name, at: {layer}, heading: `${name}, ${text}`}));
      return splits(of, name).map((split) => ({name, at: {split}, heading: of.depends(name, "split") ? `${name}, ${of.coordinates.split[split]}` : name}));
    });
  }

  function drawResults() {
    const shown = columns();
    const axes = [...new Set(sources.flatMap((source) => source.axes.map((axis) => axis.name)))];
    const single = byId("rows").value === "runs" || !axes.includes("seed");
    const keys = axes.filter((name) => single || name !== "seed");
    const heading = (text, hover) => element("th", {textContent: text, title: hover || "", scope: "col"});
    const head = element("tr", {}, ...(several ? [heading("WORKDIR")] : []), ...keys.map((name) => heading(lambda(name))),
      ...shown.map((column) => heading(column.heading, definition(column.name))));
    const rows = sources.flatMap((source) => {
      const grouped = single ? [...source.selected].sort((a, b) => a - b).map((run) => [run]) : source.settings();
      return grouped.map((runs) => element("tr", {}, ...(several ? [element("th", {textContent: source.name, scope: "row"})] : []),
        ...keys.map((name) => keyCell(source, runs[0], name)),
        ...shown.map((column) => numberCell(source, runs, column))));
    });
    // Where columns do not fit on paper, a row is printed as a list of numbers with their names.
    for (const row of rows) [...row.cells].forEach((cell, i) => { cell.dataset.name = head.cells[i].textContent; });
    byId("results").classList.toggle("many", head.cells.length > 16);
    byId("results").tHead.replaceChildren(head);
    byId("results").tBodies[0].replaceChildren(...rows);
    byId("results-note").textContent = `${sources.map((source) => `${several ? `${source.name}: ` : ""}epoch ${source.epochs[source.epoch]}`).join("; ")}. Rows are the runs that the grid has chosen.`;
    makeSortable(byId("results"));
  }

  function keyCell(source, run, name) {
    const axis = source.axes.find((one) => one.name === name);
    const text = axis ? axis.labels[source.places[run][name]] : "";
    return dataCell("th", text, text);
  }

  function numberCell(source, runs, {name, at}) {
    const values = finite(runs.map((run) => source.value(name, run, {...at, epoch: source.epoch})));
    if (!values.length) return dataCell("td", "\u2013", "");
    const [low, high] = extent(values);
    if (low === high) return dataCell("td", short(values[0]), values[0]);
    const centre = mean(values);
    const deviation = Math.sqrt(values.reduce((sum, x) => sum + (x - centre) ** 2, 0) / (values.length - 1));
    const made = dataCell("td", `${short(centre)} \u00b1 ${short(deviation, 2)}`, centre);
    made.dataset.deviation = deviation;
    return made;
  }

  function dataCell(tag, text, value) {
    const made = element(tag, {textContent: text, className: tag === "td" ? "number" : ""});
    made.dataset.value = value;
    return made;
  }

  const cellValue = (cell) => cell.dataset.value ?? cell.textContent;

  function makeSortable(table) {
    for (const [i, th] of [...table.tHead.rows[0].cells].entries()) {
      const button = element("button", {type: "button", className: "sort", textContent: th.textContent});
      button.addEventListener("click", () => sortBy(table, i, th));
      th.replaceChildren(button);
    }
  }

  /* Sorts rows by a column: as numbers where both are, and cells without one last. */
  function sortBy(table, column, th) {
    const descending = th.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    th.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const compare = (a, b) => {
      const [x, y] = [a, b].map((row) => cellValue(row.cells[column]));
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return descending ? -order : order;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  }

  const quoted = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const SPECIAL = {"\\": "\\textbackslash{}", "^": "\\textasciicircum{}", "~": "\\textasciitilde{}"};
  const escapedLatex = (text) => text.replace(/[\\{}$&#%_^~]/g, (c) => SPECIAL[c] || `\\${c}`);

  /* A column of means has a column of deviations beside it. */
  function asCsv(table) {
    const rows = [...table.tBodies[0].rows];
    const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
    const spread = heads.map((_, i) => rows.some((row) => row.cells[i].dataset.deviation));
    const first = heads.flatMap((text, i) => (spread[i] ? [text, `sd of ${text}`] : [text]));
    const lines = rows.map((row) => [...row.cells].flatMap((cell, i) => (
      spread[i] ? [cellValue(cell), cell.dataset.deviation ?? ""] : [cellValue(cell)])));
    return [first, ...lines].map((line) => line.map(quoted).join(",")).join("\n") + "\n";
  }

  function asLatex(table) {
    const latexNumber = (text) => text.replace(/(-?[\d.]+)e(-?\d+)/g, "$1 \\times 10^{$2}")
      .replaceAll("\u00b1", "\\pm").replaceAll("\u2212", "-").replaceAll("\u221e", "\\infty");
    const latexCell = (cell) => {
      if (!cell.classList.contains("number")) return escapedLatex(cell.textContent).replaceAll("\u03bb", "$\\lambda$");
      return cell.textContent === "\u2013" ? "--" : `$${latexNumber(cell.textContent)}$`;
    };
    const line = (row) => `${[...row.cells].map(latexCell).join(" & ")} \\\\`;
    const width = table.tHead.rows[0].cells.length;
    return [`\\begin{tabular}{${"r".repeat(width)}}`, "\\toprule", line(table.tHead.rows[0]), "\\midrule",
      ...[...table.tBodies[0].rows].map(line), "\\bottomrule", "\\end{tabular}", ""].join("\n");
  }

  function addTools(table) {
    const area = element("textarea", {readOnly: true, hidden: true, "aria-label": "the table as text"});
    const said = element("output");
    const copier = (label, make) => {
      const button = element("button", {type: "button", textContent: `copy as ${label}`});
      button.addEventListener("click", async () => {
        area.value = make(table);
        area.hidden = false;
        area.select();
        try {
          await navigator.clipboard.writeText(area.value);
          said.textContent = "copied";
        } catch {
          said.textContent = "selected: copy it with Ctrl-C";
        }
      });
      return button;
    };
    const tools = element("div", {className: "tools", id: table.id ? `${table.id}-tools` : ""}, copier("CSV", asCsv), copier("LaTeX", asLatex), said, area);
    table.closest(".scroll").after(tools);
    if (table.tHead.rows.length) makeSortable(table);
  }

  // ---- the page

  function drawFinals() {
    drawPredictions();
    drawCauses();
    drawParallel();
    drawResults();
  }

  function drawAll() {
    drawPanels();
    drawFinals();
    drawFocus();
  }

  function fillSelect(select, options) {
    select.replaceChildren(...options.map(([value, text, hover]) => element("option", {value, textContent: text, title: hover || ""})));
  }

  const grown = (dims) => (source, name) => source.has(name) && dims.some((dim) => source.depends(name, dim));
  const names = Object.keys(page.metrics);
  const isScalar = (name) => sources.some((source) => source.has(name) && !grown(["mode", "label", "other_label"])(source, name)
    && !(source.depends(name, "layer") && source.axes[0].name !== "layer") && source.variables[name].dims.includes(source.axes[0].name));

  function anyOptions() {
    return names.flatMap((name) => {
      const of = sources.find((source) => source.depends(name, "epoch"));
      if (!of) return [];
      const dim = ["layer", "mode", "label"].find((one) => of.depends(name, one) && of.axes[0].name !== one);
      const text = `${title(name)} (${name})`;
      if (!dim) return [[name, text, definition(name)]];
      return of.coordinates[dim].map((label, i) => [`${name}|${dim}|${i}`, `${text}, ${dim} ${label}`, definition(name)]);
    });
  }

  function start() {
    fillSelect(byId("grid-metric"), [...new Set([...page.panels, ...names.filter(isScalar)])].map((name) => [name, `${title(name)} (${name})`, definition(name)]));
    state.metric = byId("grid-metric").value;
    const any = anyOptions();
    fillSelect(byId("any-metric"), any);
    byId("any-metric").value = ["loss", "cdnv"].find((name) => any.some(([value]) => value === name)) || any[0][0];
    const layered = names.filter((name) => sources.some((source) => source.depends(name, "layer") && source.axes[0].name !== "layer"));
    fillSelect(byId("layer-metric"), layered.map((name) => [name, title(name), definition(name)]));
    byId("panels").append(...page.panels.map((name) => {
      const holder = element("div", {className: "chart"});
      holder.dataset.metric = name;
      return holder;
    }));
    for (const part of ["predictions", "causes"]) {
      byId(part).append(...page[part].map((_, i) => {
        const holder = element("div", {className: "chart"});
        holder.dataset.index = i;
        return holder;
      }));
      byId(`${part}-section`).hidden = !page[part].length;
    }
    const clocks = sources.some((source) => source.has("relaxation_time"));
    byId("clock").options[1].hidden = !clocks;
    byId("split").closest("label").hidden = !sources.some((source) => "split" in source.coordinates);
    byId("rows").closest("label").hidden = !sources.some((source) => source.axes.some((axis) => axis.name === "seed" && axis.labels.length > 1));
    const left = sources.filter((source) => source.omitted.length);
    byId("omitted").textContent = left.map((source) => `Left out of this page for their size, and in history.nc of ${source.name}: ${source.omitted.join(", ")}.`).join(" ");
    const trained = sources.flatMap((source) => source.epochs).filter((epoch) => epoch > 0);
    // From 1 to 10 epochs, say, the initialization is worth more than decades.
    if (!trained.length || extent(trained)[1] < 20 * extent(trained)[0]) byId("x-scale").value = "linear";
    if (page.version) restore();
    drawGrids();
    for (const table of document.querySelectorAll("table[data-tools]")) addTools(table);
    drawAll();
    listen();
    document.documentElement.dataset.ready = performance.now();
  }

  function listen() {
    const on = (id, act) => byId(id).addEventListener("change", act);
    on("grid-metric", () => { state.metric = byId("grid-metric").value; drawGrids(); });
    for (const id of ["clock", "x-scale", "y-scale"]) on(id, drawAll);
    on("split", () => { drawGrids(); drawAll(); });
    on("any-metric", drawAny);
    on("layer-metric", drawFocus);
    for (const id of ["rows", "every"]) on(id, drawResults);
    byId("select-all").addEventListener("click", () => {
      for (const source of sources) source.selected = new Set(source.places.keys());
      markSelected();
      drawAll();
    });
    for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", drawAll);
  }

  // ---- a page that a server renews

  const KEPT = ["grid-metric", "clock", "x-scale", "y-scale", "split", "any-metric", "layer-metric", "rows"];

  /* Asks for newer measurements, and loads them under the choices that were made. */
  function watch() {
    setInterval(async () => {
      try {
        const newest = await (await fetch("version")).text();
        if (newest === page.version) return;
      } catch {
        return; // The server has ended: what is shown stays.
      }
      const selected = sources.map((source) => (source.selected.size < source.runs ? [...source.selected] : null));
      const chosen = KEPT.map((id) => byId(id).value);
      sessionStorage.setItem("kept", JSON.stringify({selected, chosen, focus: state.focus}));
      location.reload();
    }, 2000);
  }

  function restore() {
    const kept = JSON.parse(sessionStorage.getItem("kept") || "null");
    if (!kept) return;
    KEPT.forEach((id, i) => { if (kept.chosen[i]) byId(id).value = kept.chosen[i]; });
    state.metric = byId("grid-metric").value;
    for (const [i, source] of sources.entries()) {
      const runs = (kept.selected[i] || []).filter((run) => run < source.runs);
      if (runs.length) source.selected = new Set(runs);
    }
    const {source, run} = kept.focus;
    if (source < sources.length && run < sources[source].runs) state.focus = kept.focus;
  }

  start();
  if (page.version) watch();
})();
