// TITLE

export const size = SIZE; // channels, height, width of an image
export const outputs = OUTPUTS; // numbers for each image
// (x - mean) / std of each channel of pixels from 0 to 1, and the classes' names
export const preprocessing = KNOWN;

/**
 * The network as a function: a Float32Array of images (channels, height, width), one after another, to a Float32Array
 * of their outputs. `source` is a URL, a Response or the module's bytes.
 */
export async function load(source = new URL("net_name.wasm", import.meta.url)) {
  const { instance } = await WebAssembly.instantiate(await bytesOf(source));
  const { memory, image, result, run } = instance.exports;
  const inputs = size[0] * size[1] * size[2];
  const input = new Float32Array(memory.buffer, image(), inputs);
  const output = new Float32Array(memory.buffer, result(), outputs);
  return (images) => {
    if (!(images instanceof Float32Array) || images.length % inputs) {
      throw new TypeError(`images are a Float32Array of ${inputs} numbers each`);
    }
    const results = new Float32Array((images.length / inputs) * outputs);
    for (let i = 0; i * inputs < images.length; i++) {
      input.set(images.subarray(i * inputs, (i + 1) * inputs));
      run();
      results.set(output, i * outputs);
    }
    return results;
  };
}

async function bytesOf(source) {
  const url = typeof source === "string" ? new URL(source, import.meta.url) : source;
  if (!(url instanceof URL)) return url instanceof Response ? url.arrayBuffer() : url;
  if (url.protocol === "file:") return (await import("node:fs/promises")).readFile(url);
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  return response.arrayBuffer();
}
