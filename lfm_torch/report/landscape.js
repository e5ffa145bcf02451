{
  const data = JSON.parse(document.getElementById("landscape").textContent);
  const count = data.names.length;
  // decoded when first asked for
  const bytes = holder => holder.bytes ??= decode(holder.values);
  function decode(text) {
    const letters = atob(text), found = new Uint8Array(letters.length);
    for (let i = 0; i < letters.length; i++) found[i] = letters.charCodeAt(i);
    return found;
  }
  const value = (byte, low, high) => byte === 255 ? NaN : low + (high - low) * byte / 254;
  const shown = number => isNaN(number) ? "failed" : number.toFixed(3);
  for (const image of document.querySelectorAll("img.cluster")) {
    const measure = data.measures[image.dataset.measure];
    const line = image.parentElement.querySelector("output");
    image.addEventListener("mousemove", event => {
      const box = image.getBoundingClientRect();
      const at = place => Math.min(count - 1, Math.max(0, Math.floor(place * count)));
      const row = data.order[at((event.clientY - box.top) / box.height)], column = data.order[at((event.clientX - box.left) / box.width)];
      const number = value(bytes(measure)[row * count + column], measure.low, measure.high);
      line.textContent = `${data.names[row]} → ${data.names[column]}: ${shown(number)}`;
    });
  }
  document.getElementById("save-matrix").addEventListener("click", () => {
    const measure = data.measures[0], values = bytes(measure);
    const quoted = name => `"${name.replaceAll('"', '""')}"`;
    const rows = data.order.map(i => [quoted(data.names[i]), ...data.order.map(j => shown(value(values[i * count + j], measure.low, measure.high)))].join(","));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([["", ...data.order.map(i => quoted(data.names[i]))].join(",") + "\n" + rows.join("\n") + "\n"], {type: "text/csv"}));
    link.download = "checkpoints.csv";
    link.click();
    URL.revokeObjectURL(link.href);
  });
  const selects = ["from", "to"].map(id => document.getElementById(id));
  if (selects[0]) {
    for (const [k, select] of selects.entries()) {
      select.append(...data.names.map((name, i) => new Option(name, i, false, i === data.first[k])));
      select.addEventListener("change", draw);
    }
    draw();
  }
  function layer(i, j) {
    // the upper triangle, row by row
    const n = count * data.layers.length, [a, b] = i <= j ? [i, j] : [j, i];
    return value(bytes(data.triangle)[a * n - a * (a - 1) / 2 + b - a], data.low, data.high);
  }
  function draw() {
    const [from, to] = selects.map(select => Number(select.value)), size = data.layers.length;
    const values = data.layers.map((_, i) => data.layers.map((_, j) => layer(from * size + i, to * size + j)));
    const svg = document.getElementById("layers"), gap = svg.height.baseVal.value / size;
    const make = (kind, attributes, text) => {
      const element = document.createElementNS(svg.namespaceURI, kind);
      for (const [name, content] of Object.entries(attributes)) element.setAttribute(name, content);
      if (text) element.textContent = text;
      return element;
    };
    const close = number => data.distance ? 1 - (number - data.low) / (data.high - data.low) : (number - data.low) / (data.high - data.low);
    const short = name => name.length > 18 ? "…" + name.slice(-17) : name;
    const lines = [];
    values.forEach((row, i) => {
      const best = row.reduce((k, number, j) => isNaN(row[k]) || close(number) > close(row[k]) ? j : k, 0);
      row.forEach((number, j) => {
        if (isNaN(number)) return;
        const chosen = j === best;
        const line = make("line", {x1: 130, x2: 310, y1: gap * (i + .5), y2: gap * (j + .5), stroke: chosen ? "var(--accent)" : "var(--soft)", "stroke-width": chosen ? 3 : 1.5, opacity: Math.max(.06, close(number) ** 2)});
        line.append(make("title", {}, `${data.layers[i]} → ${data.layers[j]}: ${shown(number)}`));
        lines.push([chosen, line]);
      });
    });
    svg.replaceChildren(...lines.sort((a, b) => a[0] - b[0]).map(pair => pair[1]),
      ...data.layers.map((name, i) => make("text", {x: 122, y: gap * (i + .5) + 4, "text-anchor": "end"}, short(name))),
      ...data.layers.map((name, i) => make("text", {x: 318, y: gap * (i + .5) + 4}, short(name))));
    const table = document.getElementById("layer-values");
    table.replaceChildren();
    if (size > 16) return;
    const head = table.createTHead().insertRow();
    head.insertCell();
    for (const name of data.layers) { const cell = document.createElement("th"), label = document.createElement("span"); label.textContent = name; cell.append(label); head.append(cell); }
    const body = table.createTBody();
    values.forEach((row, i) => {
      const line = body.insertRow(), name = document.createElement("th");
      name.textContent = data.layers[i];
      line.append(name);
      for (const number of row) line.insertCell().textContent = isNaN(number) ? "" : number.toFixed(2);
    });
  }
}
