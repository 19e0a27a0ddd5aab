// Zoom from the whole map to the columns of one layer, of one module in all layers, or of one module.
// Colours and axes follow the switch of the whole map; figures.py does the same for it.
const profiles = JSON.parse(document.getElementById("profiles").textContent);
for (const map of Object.values(profiles)) map.cells = unpacked(map);

function unpacked(map) {
  const bytes = Uint8Array.from(atob(map.data), letter => letter.charCodeAt(0)).buffer;
  const total = map.cells.reduce((sum, cell) => sum + cell[4], 0);
  const means = new Float32Array(bytes, 0, total), peaks = new Float32Array(bytes, 4 * total, total);
  const offsets = new Uint32Array(bytes, 8 * total, total);
  let next = 0;
  return map.cells.map(([row, column, columns, modules, count]) => {
    const buckets = Array.from({length: count}, (_, b) => {
      const from = Math.floor(b * columns / count), to = Math.floor((b + 1) * columns / count) - 1;
      return {from, to, mean: means[next], peak: peaks[next], at: from + offsets[next++]};
    });
    return {row, column, columns, modules, buckets};
  });
}

const digits = (value, count = 6) => String(Number(value.toPrecision(count)));
const short = value => value >= 1000 && value < 1e9 ? `${digits(value / (value < 1e6 ? 1e3 : 1e6), 2)}${value < 1e6 ? "k" : "M"}` : digits(value, 2);

// What puts a value between 0 and 1 (with its sign), and the ticks of that scale.
function placing(values, scale) {
  const sizes = values.map(Math.abs).sort((a, b) => a - b), end = sizes.at(-1), count = sizes.length;
  const signed = values.some(value => value < 0);
  const atMost = size => { // how many are no larger
    let low = 0, high = count;
    while (low < high) { const middle = (low + high) >> 1; if (sizes[middle] <= size) low = middle + 1; else high = middle; }
    return low;
  };
  const least = sizes.find(size => size > 0) ?? end;
  const decades = Math.min(Math.max(least < end ? Math.ceil(Math.log10(end / least)) : 1, 1), 4);
  const ways = {
    linear: size => size / end,
    log: size => size ? Math.max(0, 1 + Math.log10(size / end) / decades) : 0,
    rank: size => atMost(size) / count,
  };
  const middle = Math.max(1, Math.ceil(count / 2));
  let ticks = {
    linear: [[0, "0"], [0.5, short(end / 2)], [1, short(end)]],
    log: Array.from({length: decades + 1}, (_, k) => [1 - k / decades, short(end / 10 ** k)]).reverse(),
    rank: [[1 / count, String(count)], [(count - middle + 1) / count, String(middle)], [1, "1"]],
  }[scale];
  if (signed) ticks = [[-1, scale === "rank" ? "1" : "−" + short(end)], [0, scale === "rank" ? String(count) : "0"], ticks.at(-1)];
  return {place: value => end ? Math.sign(value) * ways[scale](Math.abs(value)) : 0, ticks, signed};
}

function said(map, cell, bucket) {
  const lines = [map.rows[cell.row], map.columns[cell.column]];
  if (bucket.from === bucket.to) lines.push(`column ${bucket.from}`, `relevance ${digits(bucket.peak)}`);
  else lines.push(`columns ${bucket.from} to ${bucket.to}`, `mean ${digits(bucket.mean)}`, `column ${bucket.at} has ${digits(bucket.peak)}`);
  if (map.total) lines.push(`column ${bucket.at}: ${digits(100 * bucket.peak / map.total, 4)} % of all relevance`);
  if (cell.modules > 1) lines.push(`${map.total ? "sum" : "mean"} of ${cell.modules} modules`);
  return lines.join("<br>");
}

function base(map, height, more) {
  const {paper_bgcolor, plot_bgcolor, font, hoverlabel, dragmode} = map.layout;
  return {paper_bgcolor, plot_bgcolor, font, hoverlabel, dragmode, height, showlegend: false, ...more};
}

// A row of colours for each cell: modules of one layer from the top, or layers from the bottom.
function rowsFigure(map, cells, scale, layers) {
  const values = cells.flatMap(cell => cell.buckets.map(bucket => bucket.mean));
  const {place, ticks, signed} = placing(values, scale);
  const data = cells.map((cell, i) => ({
    type: "heatmap", coloraxis: "coloraxis", ygap: 2, hovertemplate: "%{text}<extra></extra>",
    x: [...cell.buckets.map(bucket => 100 * bucket.from / cell.columns), 100], y: [i - 0.5, i + 0.5],
    z: [cell.buckets.map(bucket => place(bucket.mean))], text: [cell.buckets.map(bucket => said(map, cell, bucket))],
  }));
  const names = cells.map(cell => layers ? map.labels[cell.row] : map.columns[cell.column]);
  const last = cells.length - 0.5;
  return {data, layout: base(map, cells.length * 22 + 84 + 44, {
    margin: {t: 84, b: 44, l: 8, r: 24},
    xaxis: {title: {text: "place among the columns, %", standoff: 8}, fixedrange: true, range: [0, 100], showgrid: false, zeroline: false},
    yaxis: {tickvals: names.map((_, i) => i), ticktext: names, range: layers ? [-0.5, last] : [last, -0.5], fixedrange: true, automargin: "left", showgrid: false, zeroline: false, ticklabelstandoff: 4},
    coloraxis: {
      colorscale: map.colors, cmin: signed ? -1 : 0, cmax: 1,
      colorbar: {orientation: "h", thickness: 10, len: 1, x: 0, xanchor: "left", y: 1, yanchor: "bottom", ypad: 4, xpad: 0, outlinewidth: 0,
        title: {text: scale === "rank" ? `rank of a bucket, of ${values.length}` : `relevance of a column${scale === "log" ? ", log" : ""}`, side: "top"},
        tickvals: ticks.map(tick => tick[0]), ticktext: ticks.map(tick => tick[1]), ticklabeloverflow: "allow"},
    },
  })};
}

// A bar for each bucket of one cell, and a point for the column with the most in it; by rank the largest comes first.
function columnsFigure(map, cell, scale) {
  const ranked = scale === "rank", log = scale === "log";
  const buckets = ranked ? [...cell.buckets].sort((a, b) => Math.abs(b.mean) - Math.abs(a.mean)) : cell.buckets;
  const signed = buckets.some(bucket => bucket.peak < 0), size = value => log ? Math.abs(value) : value;
  const color = value => signed && value > 0 ? map.positive : map.negative;
  const text = buckets.map(bucket => said(map, cell, bucket)), hovertemplate = "%{text}<extra></extra>";
  const data = [{
    type: "bar", text, textposition: "none", hovertemplate, y: buckets.map(bucket => size(bucket.mean)),
    x: buckets.map((bucket, i) => ranked ? i + 1 : (bucket.from + bucket.to) / 2),
    width: buckets.map(bucket => ranked ? 1 : bucket.to - bucket.from + 1), marker: {color: buckets.map(bucket => color(bucket.mean)), line: {width: 0}},
  }];
  const aggregated = buckets.some(bucket => bucket.from < bucket.to);
  if (aggregated) data.push({
    type: "scatter", mode: "markers", text, hovertemplate, x: buckets.map((bucket, i) => ranked ? i + 1 : bucket.at), y: buckets.map(bucket => size(bucket.peak)),
    marker: {size: 5, symbol: "circle-open", color: buckets.map(bucket => color(bucket.peak))},
  });
  const axis = {gridcolor: map.grid, zeroline: false, fixedrange: true, ticklabelstandoff: 4};
  return {data, layout: base(map, 340, {
    margin: {t: 16, b: 48, l: 8, r: 14}, bargap: 0,
    xaxis: {...axis, title: {text: ranked ? `rank by mean, of ${buckets.length} bucket${buckets.length > 1 ? "s" : ""}` : "column", standoff: 8}},
    yaxis: {...axis, title: {text: `relevance${log && signed ? ", without its sign" : ""}`, standoff: 12}, type: log ? "log" : "linear", exponentformat: "e", automargin: "left"},
  })};
}

const mapOf = panel => profiles[panel.id.replace("panel", "heatmap")];
const selected = (panel, name) => {
  const value = panel.querySelector(`select[name=${name}]`).value;
  return value === "" ? null : Number(value);
};

// Put each panel's whole map or its zoom in place, and draw the zooms that are seen.
function showZooms(onPaper) {
  for (const panel of panels) {
    const map = mapOf(panel);
    if (!map) continue;
    const row = selected(panel, "layer"), column = selected(panel, "module");
    const zoomed = !onPaper && (row !== null || column !== null);
    const place = panel.querySelector(".zoomed"), words = panel.querySelector(".zoom-words");
    panel.querySelector(".whole").hidden = zoomed;
    panel.querySelector(".beside").hidden = zoomed;
    place.hidden = !zoomed;
    panel.querySelector(".zoom button").hidden = !zoomed;
    words.textContent = "";
    if (!zoomed || !place.offsetWidth) continue;
    const cells = map.cells.filter(cell => (row === null || cell.row === row) && (column === null || cell.column === column));
    if (!cells.length) { words.textContent = "This layer has no such module with columns."; Plotly.purge(place); continue; }
    const figure = cells.length === 1 ? columnsFigure(map, cells[0], checked("scale")) : rowsFigure(map, cells, checked("scale"), row === null);
    Plotly.newPlot(place, figure.data, figure.layout, options);
    const widths = [...new Set(cells.map(cell => Math.ceil(cell.columns / cell.buckets.length)))].sort((a, b) => a - b);
    words.textContent = widths.at(-1) === 1 ? "Every column by itself." : `A bucket is ${widths.length > 1 ? `${widths[0]} to ` : ""}${widths.at(-1)} columns side by side`
      + (cells.length === 1 ? ": the bar is their mean, the circle the column with the most." : "; its colour is their mean.");
    if (cells.length > 1) place.on("plotly_click", event => {
      const cell = cells[event.points[0].curveNumber];
      zoomTo(panel, cell.row, cell.column);
    });
  }
}

function zoomTo(panel, row, column) {
  panel.querySelector("select[name=layer]").value = row ?? "";
  panel.querySelector("select[name=module]").value = column ?? "";
  show(chosen());
}

// A click into the whole map opens the layer.
function clicksZoom(name, place) {
  const map = profiles[name];
  if (map) place.on("plotly_click", event => {
    const row = event.points[0].y;
    if (map.cells.some(cell => cell.row === row)) zoomTo(place.closest(".panel"), row, null);
  });
}

// Another criterion shows the same part of the model, where it scores columns there.
function carryZoom(from, to) {
  for (const name of ["layer", "module"]) {
    const old = from.querySelector(`select[name=${name}]`), now = to.querySelector(`select[name=${name}]`);
    if (!old || !now) continue;
    const wanted = old.selectedOptions[0].textContent;
    now.value = [...now.options].find(option => option.textContent === wanted)?.value ?? "";
  }
}

document.addEventListener("click", event => {
  if (event.target.matches(".zoom button")) zoomTo(event.target.closest(".panel"), null, null);
});
