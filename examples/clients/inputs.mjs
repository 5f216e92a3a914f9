// What a model that `tidemill export --format onnx` wrote is fed, made from rows. Plain JavaScript, for browsers and Node.js.
//
//     import * as ort from "onnxruntime-node";  // or onnxruntime-web
//     const model = await readFile("delays.onnx");
//     const layout = layoutOf(model);
//     const session = await ort.InferenceSession.create(model);
//     const feeds = {};
//     for (const [name, { type, data, dims }] of Object.entries(inputsOf(layout, [{ distance: 1100, carrier: "AA" }]))) {
//       feeds[name] = new ort.Tensor(type, data, dims);
//     }
//     const { prediction } = await session.run(feeds);
//
// tests/tasks/exporting/test_clients.py compares it with Tidemill, on the vectors beside this file and on thousands of strings.

/** The layout of a model's inputs and its output, from the bytes of its file: `metadata_props` of ONNX's ModelProto. */
export function layoutOf(model) {
  const text = metadataOf(model).get("tidemill.layout");
  if (text === undefined) throw new Error("the model holds no tidemill.layout: was it written by tidemill export?");
  return JSON.parse(text);
}

/**
 * The inputs of the model for rows, objects by column: name -> { type, data, dims }, as ort.Tensor takes them.
 *
 * A number is a number, a boolean or a bigint; a time a Date, ISO 8601 text (without a zone it is UTC) or seconds since 1970; a
 * duration or a time of day seconds. null stands for no value. Throws an Error that names the column.
 */
export function inputsOf(layout, rows) {
  const inputs = {};
  const width = (columns, last) => columns.reduce((sum, column) => sum + (column[last] ?? 1), 0);
  if (layout.numbers.length) {
    const dims = [rows.length, width(layout.numbers, "width")];
    const data = new Float64Array(dims[0] * dims[1]).fill(NaN); // null
    rows.forEach((row, i) => {
      for (const column of layout.numbers) fillNumbers(data, i * dims[1] + column.at, column, valueOf(row, column));
    });
    inputs.numbers = { type: "float64", data, dims };
  }
  if (layout.ids.length) {
    const dims = [rows.length, width(layout.ids, "length")];
    const data = new BigInt64Array(dims[0] * dims[1]); // 0: null, and behind the last item
    rows.forEach((row, i) => {
      for (const column of layout.ids) fillIds(data, i * dims[1] + column.at, column, valueOf(row, column));
    });
    inputs.ids = { type: "int64", data, dims };
  }
  if (layout.nulls.length) {
    const data = Uint8Array.from(rows.flatMap((row) => layout.nulls.map((column) => valueOf(row, column) === null)));
    inputs.nulls = { type: "bool", data, dims: [rows.length, layout.nulls.length] };
  }
  return inputs;
}

function valueOf(row, { column }) {
  if (row[column] === undefined) throw new Error(`column ${column} is missing: give null where there is no value`);
  return row[column];
}

function fillNumbers(data, at, column, value) {
  if (value === null) return;
  const items = column.width === undefined ? [value] : value;
  if (items.length !== (column.width ?? 1)) throw new Error(`column ${column.column} needs a list of ${column.width} numbers`);
  Array.from(items).forEach((item, i) => {
    if (item !== null) data[at + i] = numberOf(item, column);
  });
}

function fillIds(data, at, column, value) {
  if (value === null) return;
  if (column.length !== undefined && typeof value === "string") throw new Error(`column ${column.column} needs a list, not a text`);
  const items = column.length === undefined ? [value] : value.slice(-column.length);
  items.forEach((item, i) => {
    if (item === null) return;
    const whole = typeof item === "bigint" || Number.isInteger(item);
    if ((typeof item === "string") !== column.family.endsWith("text") || (column.family === "list of integers" && !whole)) {
      throw new Error(`column ${column.column} holds ${item}, and takes ${column.family}`);
    }
    data[at + i] = BigInt(1 + bucketOf(canonical(item, column.column), column.buckets));
  });
}

function numberOf(value, { column, family }) {
  let number = value;
  if (family === "time" && value instanceof Date) number = value.getTime() / 1000;
  else if (family === "time" && typeof value === "string") number = seconds(value);
  else if (typeof value === "boolean" || typeof value === "bigint") number = Number(value);
  if (typeof number !== "number" || !Number.isFinite(number)) {
    throw new Error(`column ${column} holds ${value}, which is no ${family}: give null where there is no value`);
  }
  return number;
}

/** Seconds since 1970-01-01T00:00Z of ISO 8601 text, rounded once; NaN of other text. */
function seconds(text) {
  const parts = /^(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d(?::\d\d)?)(?:\.(\d{1,9}))?(Z|[+-]\d\d:?\d\d)?)?$/.exec(text);
  if (parts === null) return NaN;
  const [, date, time = "00:00", fraction = "", zone = "Z"] = parts;
  const whole = Date.parse(`${date}T${time}${zone}`);
  if (Number.isNaN(whole)) return NaN;
  const digits = fraction.length > 6 ? 9 : 6;
  return Number(BigInt(whole / 1000) * 10n ** BigInt(digits) + BigInt(fraction.padEnd(digits, "0"))) / 10 ** digits;
}

// ---- categories ---------------------------------------------------------------------------------------------------------------
/**
 * The bytes that stand for a category: text as UTF-8, a whole number (or a boolean) as its digits, a fraction as the shortest
 * digits that name its nearest float32.
 */
export function canonical(value, column = "") {
  if (typeof value === "string") {
    if (!value.isWellFormed()) throw new Error(`column ${column} holds half of a surrogate pair, which is no text`);
    return utf8.encode(value);
  }
  if (typeof value === "boolean" || typeof value === "bigint") return utf8.encode(BigInt(value).toString());
  if (typeof value !== "number" || !Number.isFinite(value)) throw new Error(`column ${column} holds ${value}, which is no category`);
  if (Number.isInteger(value)) {
    if (Math.abs(value) > 2 ** 53) throw new Error(`column ${column} holds ${value}, which was rounded: give a bigint or text`);
    return utf8.encode(BigInt(value).toString());
  }
  const nearest = shortest(Math.fround(value));
  if (Number.isInteger(nearest)) return utf8.encode(BigInt(nearest).toString());
  const [mantissa, exponent] = nearest.toExponential().split("e-");
  return utf8.encode(exponent > 4 ? `${mantissa}e-${exponent.padStart(2, "0")}` : String(nearest));
}

/** The double of the shortest digits that name a float32; of several, of those next to it; of two of these, of the even ones. */
function shortest(float) {
  const size = Math.abs(float);
  const all = size.toExponential(60).replace(".", "").split("e")[0];
  for (let digits = 1; digits <= 9; digits += 1) {
    const [mantissa, exponent] = size.toExponential(digits - 1).split("e");
    const unit = `e${Number(exponent) - digits + 1}`;
    let whole = Number(mantissa.replace(".", ""));
    if (/^50*$/.test(all.slice(digits))) whole -= whole % 2; // halfway: JavaScript has rounded up
    const other = Number(`${whole}${unit}`) < size ? whole + 1 : whole - 1;
    for (const candidate of [whole, other]) {
      const found = Number(`${candidate}${unit}`);
      if (Math.fround(found) === size) return Math.sign(float) * found;
    }
  }
  return float; // 0
}

/** BLAKE2b with an 8-byte digest, read big-endian, modulo `buckets`. */
export function bucketOf(bytes, buckets) {
  return Number(new DataView(digest(bytes).buffer).getBigUint64(0) % BigInt(buckets));
}

const utf8 = new TextEncoder();

// ---- BLAKE2b (RFC 7693), without a key, with a digest of 8 bytes ------------------------------------------------------------------
// A 64-bit word is two 32-bit ones, the low one first. It is no prefix of the digest of 64 bytes that most libraries make.
const IV = new Uint32Array([
  0xf3bcc908, 0x6a09e667, 0x84caa73b, 0xbb67ae85, 0xfe94f82b, 0x3c6ef372, 0x5f1d36f1, 0xa54ff53a, 0xade682d1, 0x510e527f,
  0x2b3e6c1f, 0x9b05688c, 0xfb41bd6b, 0x1f83d9ab, 0x137e2179, 0x5be0cd19,
]);
const SIGMA = [
  [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
  [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
  [11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4],
  [7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8],
  [9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13],
  [2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9],
  [12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11],
  [13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10],
  [6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5],
  [10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0],
];
const BLOCK = 128; // bytes

/** The 8 bytes of the digest. */
export function digest(bytes) {
  const h = IV.slice();
  h[0] ^= 0x01010000 ^ 8;
  const m = new Uint32Array(BLOCK / 4);
  const v = new Uint32Array(32);
  const last = Math.max(0, Math.ceil(bytes.length / BLOCK) - 1); // an empty message is one block of zeros
  for (let block = 0; block <= last; block += 1) {
    const start = block * BLOCK;
    const end = Math.min(start + BLOCK, bytes.length);
    m.fill(0);
    for (let i = start; i < end; i += 1) m[(i - start) >> 2] |= bytes[i] << (8 * (i & 3)); // a block starts at a multiple of 4
    v.set(h);
    v.set(IV, 16);
    v[24] ^= end >>> 0;
    v[25] ^= Math.floor(end / 2 ** 32);
    if (block === last) {
      v[28] = ~v[28];
      v[29] = ~v[29];
    }
    for (let round = 0; round < 12; round += 1) {
      const s = SIGMA[round % 10];
      for (let i = 0; i < 4; i += 1) mix(v, m, i, 4 + i, 8 + i, 12 + i, s[2 * i], s[2 * i + 1]);
      for (let i = 0; i < 4; i += 1) {
        mix(v, m, i, 4 + ((i + 1) % 4), 8 + ((i + 2) % 4), 12 + ((i + 3) % 4), s[8 + 2 * i], s[9 + 2 * i]);
      }
    }
    for (let i = 0; i < 16; i += 1) h[i] ^= v[i] ^ v[i + 16];
  }
  const found = new DataView(new ArrayBuffer(8));
  found.setUint32(0, h[0], true);
  found.setUint32(4, h[1], true);
  return new Uint8Array(found.buffer);
}

/** RFC 7693's G, on words a, b, c, d of v and x, y of m. */
function mix(v, m, a, b, c, d, x, y) {
  add(v, 2 * a, v[2 * b], v[2 * b + 1], m[2 * x], m[2 * x + 1]);
  turn(v, 2 * d, 2 * a, 32);
  add(v, 2 * c, v[2 * d], v[2 * d + 1], 0, 0);
  turn(v, 2 * b, 2 * c, 24);
  add(v, 2 * a, v[2 * b], v[2 * b + 1], m[2 * y], m[2 * y + 1]);
  turn(v, 2 * d, 2 * a, 16);
  add(v, 2 * c, v[2 * d], v[2 * d + 1], 0, 0);
  turn(v, 2 * b, 2 * c, 63);
}

/** v[at] += one + other. Sums of 32-bit numbers are exact in a double, and the array keeps the low 32 bits. */
function add(v, at, low, high, otherLow, otherHigh) {
  const sum = v[at] + low + otherLow;
  v[at] = sum;
  v[at + 1] = v[at + 1] + high + otherHigh + ((sum / 2 ** 32) | 0);
}

/** v[at] = (v[at] ^ v[by]), rotated to the right by 16, 24, 32 or 63 bits. */
function turn(v, at, by, bits) {
  const low = v[at] ^ v[by];
  const high = v[at + 1] ^ v[by + 1];
  if (bits === 32) {
    v[at] = high;
    v[at + 1] = low;
  } else if (bits === 63) {
    v[at] = (low << 1) | (high >>> 31);
    v[at + 1] = (high << 1) | (low >>> 31);
  } else {
    v[at] = (low >>> bits) | (high << (32 - bits));
    v[at + 1] = (high >>> bits) | (low << (32 - bits));
  }
}

// ---- Protocol Buffers, as far as metadata_props needs them ----------------------------------------------------------------------
const METADATA_PROPS = 14; // field of ModelProto: messages of key (1) and value (2)

function metadataOf(model) {
  const text = new TextDecoder();
  const found = new Map();
  for (const [field, entry] of fieldsOf(model)) {
    if (field !== METADATA_PROPS) continue;
    const parts = new Map(fieldsOf(entry));
    found.set(text.decode(parts.get(1)), text.decode(parts.get(2)));
  }
  return found;
}

/** [number, bytes] of each field that has a length; the others are passed over. */
function* fieldsOf(message) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let factor = 1; ; factor *= 128) {
      if (at >= message.length) throw new Error("this is no ONNX file");
      const byte = message[at];
      at += 1;
      value += (byte % 128) * factor;
      if (byte < 128) return value;
    }
  };
  while (at < message.length) {
    const tag = varint();
    if (tag % 8 === 0) varint();
    else if (tag % 8 === 1) at += 8;
    else if (tag % 8 === 5) at += 4;
    else if (tag % 8 === 2) {
      const length = varint();
      yield [Math.floor(tag / 8), message.subarray(at, at + length)];
      at += length;
    } else throw new Error("this is no ONNX file");
  }
}
