'use strict';
// Runs the function's model through the sidecar, by the Open Inference Protocol v2 with binary tensors.
//
//   const { Client } = require('../faaswap.js');
//   const client = new Client();
//   const { scores } = await client.infer({ x: { shape: [1, 4], data: new Float32Array([1, 2, 3, 4]) } });
//   scores.shape; scores.data;

const http = require('node:http');

const HEADER_LENGTH = 'inference-header-content-length';
// How long an inference may take; the function's deadline is far below.
const TIMEOUT_MS = 60_000;
const CONNECTIONS_MAX = 64;

const ARRAYS = {
  BOOL: Uint8Array,
  UINT8: Uint8Array,
  UINT16: Uint16Array,
  UINT32: Uint32Array,
  UINT64: BigUint64Array,
  INT8: Int8Array,
  INT16: Int16Array,
  INT32: Int32Array,
  INT64: BigInt64Array,
  // As bits: this Node.js has no arrays of half floats.
  FP16: Uint16Array,
  BF16: Uint16Array,
  FP32: Float32Array,
  FP64: Float64Array,
};

class Refused extends Error {
  constructor(status, code, text, retryAfter) {
    super(text);
    Object.assign(this, { status, code, retryAfter });
  }
}

class Client {
  constructor({ url = process.env.FAASWAP_SIDECAR_URL || 'http://127.0.0.1:9463', model } = {}) {
    this.url = new URL(url);
    this.model = model;
    this.agent = new http.Agent({ keepAlive: true, maxSockets: CONNECTIONS_MAX });
  }

  // Names, types and shapes of the model's inputs and outputs.
  async metadata() {
    if (!this.about) {
      if (!this.model) {
        const [first] = JSON.parse((await this.ask('GET', '/v2/models')).body).models;
        this.model = first.name ?? first;
      }
      this.about = JSON.parse((await this.ask('GET', this.path())).body);
    }
    return this.about;
  }

  // Runs the model once: {name: {shape, data}} to {name: {shape, data, datatype}}.
  async infer(inputs) {
    const about = await this.metadata();
    const types = Object.fromEntries(about.inputs.map((one) => [one.name, one.datatype]));
    const pieces = [];
    const listed = Object.entries(inputs).map(([name, { shape, data }]) => {
      const datatype = types[name];
      if (!datatype) throw new TypeError(`the model has no input '${name}'; it has ${Object.keys(types).join(', ')}`);
      if (!(data instanceof ARRAYS[datatype])) {
        throw new TypeError(`input '${name}' is ${data?.constructor?.name}; ${datatype} takes ${ARRAYS[datatype].name}`);
      }
      pieces.push(Buffer.from(data.buffer, data.byteOffset, data.byteLength));
      return { name, datatype, shape, parameters: { binary_data_size: data.byteLength } };
    });
    const head = Buffer.from(JSON.stringify({ inputs: listed, parameters: { binary_data_output: true } }));
    const headers = { [HEADER_LENGTH]: head.length, 'content-type': 'application/octet-stream' };
    return read(await this.ask('POST', `${this.path()}/infer`, Buffer.concat([head, ...pieces]), headers));
  }

  path() {
    return `/v2/models/${encodeURIComponent(this.model)}`;
  }

  ask(method, path, body, headers = {}) {
    return new Promise((resolve, reject) => {
      const { hostname, port } = this.url;
      const length = { 'content-length': body ? body.length : 0 };
      const options = { hostname, port, method, path, agent: this.agent, timeout: TIMEOUT_MS };
      const request = http.request({ ...options, headers: { ...headers, ...length } }, async (reply) => {
        try {
          const pieces = [];
          for await (const piece of reply) pieces.push(piece);
          const whole = { headers: reply.headers, body: Buffer.concat(pieces) };
          if (reply.statusCode === 200) resolve(whole);
          else reject(refusal(reply.statusCode, whole));
        } catch (error) {
          reject(error);
        }
      });
      request.on('timeout', () => request.destroy(new Error(`no answer within ${TIMEOUT_MS} ms`)));
      request.on('error', reject);
      request.end(body);
    });
  }
}

function refusal(status, { headers, body }) {
  let text = body.toString();
  try {
    text = JSON.parse(text).error ?? text;
  } catch {
    // Not ours: shown as it came.
  }
  return new Refused(status, headers['faaswap-refusal'] ?? '', text, Number(headers['retry-after']) || undefined);
}

function read({ headers, body }) {
  let at = Number(headers[HEADER_LENGTH] ?? body.length);
  const answers = {};
  for (const { name, datatype, shape, parameters } of JSON.parse(body.subarray(0, at)).outputs) {
    const bytes = Uint8Array.prototype.slice.call(body, at, at + parameters.binary_data_size);
    answers[name] = { datatype, shape, data: new ARRAYS[datatype](bytes.buffer) };
    at += bytes.length;
  }
  return answers;
}

module.exports = { Client, Refused };
