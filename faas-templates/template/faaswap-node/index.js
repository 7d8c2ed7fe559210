'use strict';
// Serves the function's handler over HTTP, behind the sidecar. What functions see is the contract of OpenFaaS' node
// templates: `module.exports = async (event, context) => context.status(200).succeed(body)`.

const http = require('node:http');

const handle = require('./function/handler.js');

const PORT = Number(process.env.FAASWAP_HANDLER_PORT || 3000);
// The sidecar limits bodies before we do; this is for whoever reaches the port directly.
const BODY_BYTES_MAX = 1 << 30;
// Longer than the sidecar keeps connections, so that it and not we close.
const KEEP_ALIVE_MS = 30_000;

class Context {
  constructor() {
    this.statusCode = 200;
    this.headerValues = {};
  }
  status(code) {
    if (code === undefined) return this.statusCode;
    this.statusCode = code;
    return this;
  }
  headers(values) {
    if (values === undefined) return this.headerValues;
    this.headerValues = values;
    return this;
  }
  succeed(body) {
    this.body = body;
    return this;
  }
  fail(error) {
    this.error = error;
    return this;
  }
}

async function bodyOf(request) {
  const pieces = [];
  let length = 0;
  for await (const piece of request) {
    length += piece.length;
    if (length > BODY_BYTES_MAX) throw Object.assign(new Error('the request body is too large'), { status: 413 });
    pieces.push(piece);
  }
  return Buffer.concat(pieces);
}

function asBytes(body) {
  if (body === undefined || body === null) return ['text/plain', Buffer.alloc(0)];
  if (Buffer.isBuffer(body) || ArrayBuffer.isView(body)) return ['application/octet-stream', body];
  if (typeof body === 'string') return ['text/plain; charset=utf-8', Buffer.from(body)];
  return ['application/json', Buffer.from(JSON.stringify(body))];
}

async function answer(request) {
  const url = new URL(request.url, 'http://function');
  const event = {
    body: await bodyOf(request),
    headers: request.headers,
    method: request.method,
    path: url.pathname,
    query: Object.fromEntries(url.searchParams),
  };
  const context = new Context();
  const returned = await handle(event, context);
  if (context.error) throw context.error;
  const [kind, body] = asBytes(returned instanceof Context ? returned.body : (returned ?? context.body));
  return [context.statusCode, { 'content-type': kind, ...context.headerValues }, body];
}

const server = http.createServer(async (request, response) => {
  let reply;
  try {
    reply = await answer(request);
  } catch (error) {
    console.error(`handler failed: ${error}`);
    // A refusal of the node is passed on as such, so that the platform tries again; anything else is the handler's.
    const status = Number.isInteger(error?.status) ? error.status : 500;
    reply = [status, status === 503 ? { 'retry-after': '1' } : {}, Buffer.from(String(error))];
  }
  const [status, headers, body] = reply;
  response.writeHead(status, { ...headers, 'content-length': body.byteLength });
  response.end(body);
});
server.keepAliveTimeout = KEEP_ALIVE_MS;
server.listen(PORT, '127.0.0.1');

// The sidecar in front still takes requests after SIGTERM, and ends us when it is done.
process.on('SIGTERM', () => {});
