// The page of the demo: a picture in, probabilities and signs out. nets/ is written by make.py.

const SIZE = 32, RUNS = 9;
const TITLES = { binary: "1-bit network", float: "The same network in float32" };
const $ = (id) => document.getElementById(id);
const networks = {};
let facts, last;

async function begin() {
  facts = await (await fetch("nets/nets.json")).json();
  $("labels").textContent = facts.labels.join(", ");
  for (const key of [...Object.keys(facts.networks), "signs"]) {
    networks[key] = await (await import(`./nets/net_${key}.js`)).load();
  }
  for (const { layer, shape } of facts.signs) {
    $("layer").add(new Option(`${layer}: ${shape[0]} channels of ${shape[1]} × ${shape[2]}`, layer));
  }
  $("status").textContent = "";
  await show("nets/cat.png");
}

// The middle square of an image, shrunk by halves because browsers shrink with too few pixels at once.
function shrunk(image) {
  const side = Math.min(image.width, image.height);
  let from = image, at = [(image.width - side) / 2, (image.height - side) / 2], size = side;
  do {
    const next = Math.max(SIZE, Math.floor(size / 2));
    const canvas = Object.assign(document.createElement("canvas"), { width: next, height: next });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingQuality = "high";
    context.fillStyle = "white"; // behind what is transparent
    context.fillRect(0, 0, next, next);
    context.drawImage(from, ...at, size, size, 0, 0, next, next);
    [from, at, size] = [canvas, [0, 0], next];
  } while (size > SIZE);
  return from;
}

// Pixels (height, width, RGBA) from 0 to 255 as the network's input (channels, height, width).
export function standardized(pixels, { mean, std }) {
  const count = pixels.length / 4, input = new Float32Array(3 * count);
  for (let c = 0; c < 3; c++) {
    for (let i = 0; i < count; i++) input[c * count + i] = (pixels[4 * i + c] / 255 - mean[c]) / std[c];
  }
  return input;
}

export function softmax(logits) {
  const most = Math.max(...logits), powers = Array.from(logits, (x) => Math.exp(x - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((x) => x / sum);
}

function timed(network, input) {
  const times = [];
  let output;
  for (let i = 0; i < RUNS; i++) {
    // Clocks of browsers are coarse: enough calls that each measurement takes some milliseconds.
    const start = performance.now();
    let calls = 0;
    do {
      output = network(input);
      calls++;
    } while (performance.now() - start < 3 && calls < 20);
    times.push((performance.now() - start) / calls);
  }
  return { output, milliseconds: times.sort((a, b) => a - b)[RUNS >> 1] };
}

async function show(source) {
  const image = new Image();
  image.src = source;
  try {
    await image.decode();
  } catch {
    $("status").textContent = "Your browser cannot read this as a picture. Choose a PNG, JPEG or WebP file.";
    return;
  }
  const small = shrunk(image), context = $("seen").getContext("2d");
  context.drawImage(small, 0, 0);
  last = standardized(small.getContext("2d").getImageData(0, 0, SIZE, SIZE).data, facts);
  $("status").textContent = "";
  $("networks").replaceChildren(...Object.keys(facts.networks).map((key) => card(key)));
  drawSigns();
}

function card(key) {
  const { top1, packed_bytes: bytes } = facts.networks[key];
  const { output, milliseconds } = timed(networks[key], last);
  const chances = softmax(output);
  const order = chances.map((_, i) => i).sort((a, b) => chances[b] - chances[a]).slice(0, 5);
  const box = element("article", `network ${key}`);
  box.append(element("h2", "", TITLES[key]));
  const line = element("p", "facts");
  line.append(
    element("b", "", `${Math.round(bytes / 1000)} kB`), " of weights, ", element("b", "", `${milliseconds.toFixed(2)} ms`),
    ` for a picture; right on ${top1.toFixed(1)} % of CIFAR-10’s test pictures`,
  );
  box.append(line);
  order.forEach((i, place) => {
    const row = element("div", place ? "row" : "row first"), bar = element("i"), track = element("span");
    bar.style.width = `${100 * chances[i]}%`;
    track.append(bar);
    row.append(element("span", "", facts.labels[i]), track, element("span", "", `${(100 * chances[i]).toFixed(1)} %`));
    box.append(row);
  });
  return box;
}

function element(tag, name = "", text = "") {
  return Object.assign(document.createElement(tag), { className: name, textContent: text });
}

function drawSigns() {
  if (!last) return;
  const all = networks.signs(last);
  let from = 0;
  for (const { layer, shape } of facts.signs) {
    const length = shape[0] * shape[1] * shape[2];
    if (layer === $("layer").value) draw(all.subarray(from, from + length), ...shape);
    from += length;
  }
  $("inside").hidden = false;
}

function draw(maps, channels, height, width) {
  const across = channels > 16 ? (channels > 32 ? 16 : 8) : 8, gap = Math.max(1, width >> 4);
  const canvas = $("signs"), context = canvas.getContext("2d");
  canvas.width = across * (width + gap) - gap;
  canvas.height = Math.ceil(channels / across) * (height + gap) - gap;
  for (let c = 0; c < channels; c++) {
    const tile = context.createImageData(width, height);
    for (let i = 0; i < height * width; i++) {
      tile.data.set(maps[i * channels + c] >= 0 ? [255, 255, 255, 255] : [0, 0, 0, 255], 4 * i);
    }
    context.putImageData(tile, (c % across) * (width + gap), Math.floor(c / across) * (height + gap));
  }
}

function take(files) {
  const file = [...files].find((f) => f.type.startsWith("image/"));
  if (!file) return;
  const url = URL.createObjectURL(file);
  show(url).finally(() => URL.revokeObjectURL(url));
}

if ($("drop")) {
  $("file").addEventListener("change", (event) => take(event.target.files));
  $("cat").addEventListener("click", () => show("nets/cat.png"));
  $("layer").addEventListener("change", drawSigns);
  document.addEventListener("paste", (event) => take(event.clipboardData.files));
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", name === "dragover");
      if (name === "drop") take(event.dataTransfer.files);
    });
  }
  begin().catch((error) => {
    $("status").textContent = `The networks cannot be loaded: ${error.message}`;
  });
}
