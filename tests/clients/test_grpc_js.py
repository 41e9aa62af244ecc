"""gRPC's interoperability cases, by its client for JavaScript, against our gRPC server; and a router by reflection."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.certificates import Authority
from tests.clients.conftest import node_program
from tests.cluster.harness import Cluster
from tests.interop.service import PROTO
from tests.interop.service import serving as interop_service
from trust.tls import Tls

NEEDS = ("@grpc/grpc-js", "@grpc/proto-loader", "grpc-js-reflection-client")

CASES = """
import assert from "node:assert";
import { readFileSync } from "node:fs";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [address, proto, ca] = process.argv.slice(2);
const testing = grpc.loadPackageDefinition(loader.loadSync(proto, { keepCase: true })).grpc.testing;
const credentials = ca ? grpc.credentials.createSsl(readFileSync(ca)) : grpc.credentials.createInsecure();
const stub = new testing.TestService(address, credentials);
const payload = (size) => ({ body: Buffer.alloc(size) });
const unary = (method, request, metadata = new grpc.Metadata(), by = stub) =>
  new Promise((done) => {
    const said = {};
    const call = by[method](request, metadata, { deadline: Date.now() + 20000 }, (error, answer) => {
      Object.assign(said, { error, answer });
    });
    call.on("metadata", (initial) => (said.initial = initial));
    call.on("status", (status) => setImmediate(() => done({ ...said, status })));
  });
const ended = (call) =>
  new Promise((done) => {
    const answers = [];
    call.on("data", (answer) => answers.push(answer.payload.body.length));
    call.on("error", () => {});
    call.on("status", (status) => setImmediate(() => done({ answers, status })));
  });
const asking = (size, sent) => ({ response_parameters: [{ size }], payload: payload(sent) });
const SIZES = [[31415, 27182], [9, 8], [2653, 1828], [58979, 45904]];
const SPECIAL = "\\t\\ntest with whitespace\\r\\nand Unicode BMP \\u263a and non-BMP \\u{1f608}\\t\\n";

const cases = {
  async empty_unary() {
    assert.equal((await unary("EmptyCall", {})).status.code, 0);
  },
  async large_unary() {
    const { answer } = await unary("UnaryCall", { response_size: 314159, payload: payload(271828) });
    assert.equal(answer.payload.body.length, 314159);
  },
  async client_compressed_unary() {
    const by = new testing.TestService(address, credentials, { "grpc.default_compression_algorithm": 2 });
    const { answer } = await unary("UnaryCall", { response_size: 314159, payload: payload(271828) }, undefined, by);
    assert.equal(answer.payload.body.length, 314159);
    by.close();
  },
  async client_streaming() {
    const answer = await new Promise((done, fail) => {
      const call = stub.StreamingInputCall((error, answer) => (error ? fail(error) : done(answer)));
      for (const sent of [27182, 8, 1828, 45904]) call.write({ payload: payload(sent) });
      call.end();
    });
    assert.equal(answer.aggregated_payload_size, 74922);
  },
  async server_streaming() {
    const sizes = SIZES.map(([size]) => size);
    const { answers } = await ended(stub.StreamingOutputCall({ response_parameters: sizes.map((size) => ({ size })) }));
    assert.deepEqual(answers, sizes);
  },
  async ping_pong() {
    const call = stub.FullDuplexCall();
    let next = 0;
    call.on("data", () => (next < SIZES.length ? call.write(asking(...SIZES[next++])) : call.end()));
    const over = ended(call);
    call.write(asking(...SIZES[next++]));
    const { answers, status } = await over;
    assert.deepEqual([answers, status.code], [SIZES.map(([size]) => size), 0]);
  },
  async empty_stream() {
    const call = stub.FullDuplexCall();
    call.end();
    const { answers, status } = await ended(call);
    assert.deepEqual([answers, status.code], [[], 0]);
  },
  async custom_metadata() {
    const metadata = new grpc.Metadata();
    metadata.set("x-grpc-test-echo-initial", "test_initial_metadata_value");
    metadata.set("x-grpc-test-echo-trailing-bin", Buffer.from([0xab, 0xab, 0xab]));
    const check = (initial, status) => {
      assert.deepEqual(initial.get("x-grpc-test-echo-initial"), ["test_initial_metadata_value"]);
      assert.deepEqual(status.metadata.get("x-grpc-test-echo-trailing-bin"), [Buffer.from([0xab, 0xab, 0xab])]);
    };
    const { initial, status } = await unary("UnaryCall", { response_size: 3, payload: payload(3) }, metadata);
    check(initial, status);
    const call = stub.FullDuplexCall(metadata);
    const begun = new Promise((done) => call.on("metadata", done));
    call.end(asking(3, 3));
    const over = await ended(call);
    check(await begun, over.status);
  },
  async status_code_and_message() {
    const response_status = { code: 2, message: "test status message" };
    const { status } = await unary("UnaryCall", { response_status });
    assert.deepEqual([status.code, status.details], [2, "test status message"]);
    const call = stub.FullDuplexCall();
    call.end({ response_status });
    const over = await ended(call);
    assert.deepEqual([over.status.code, over.status.details], [2, "test status message"]);
  },
  async special_status_message() {
    const { status } = await unary("UnaryCall", { response_status: { code: 2, message: SPECIAL } });
    assert.deepEqual([status.code, status.details], [2, SPECIAL]);
  },
  async unimplemented_method() {
    assert.equal((await unary("UnimplementedCall", {})).status.code, grpc.status.UNIMPLEMENTED);
  },
  async unimplemented_service() {
    const by = new testing.UnimplementedService(address, credentials);
    assert.equal((await unary("UnimplementedCall", {}, undefined, by)).status.code, grpc.status.UNIMPLEMENTED);
    by.close();
  },
  async cancel_after_begin() {
    const { code } = await new Promise((done) => {
      const call = stub.StreamingInputCall((error) => done(error));
      call.cancel();
    });
    assert.equal(code, grpc.status.CANCELLED);
  },
  async cancel_after_first_response() {
    const call = stub.FullDuplexCall();
    call.on("data", () => call.cancel());
    const over = ended(call);
    call.write(asking(31415, 27182));
    assert.equal((await over).status.code, grpc.status.CANCELLED);
  },
  async timeout_on_sleeping_server() {
    const call = stub.FullDuplexCall({ deadline: Date.now() + 50 });
    call.write({ payload: payload(27182) });
    assert.equal((await ended(call)).status.code, grpc.status.DEADLINE_EXCEEDED);
  },
};
for (const [name, run] of Object.entries(cases)) {
  try {
    await run();
  } catch (error) {
    throw new Error(name, { cause: error });
  }
}
console.log(Object.keys(cases).length);
process.exit(0); // else it waits, with any server, for the call that it cancelled before it began
"""


@pytest.mark.parametrize("secure", [False, True], ids=["plaintext", "tls"])
async def test_grpcs_interoperability_cases(secure: bool, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    async with interop_service(Tls(authority.issue("router")) if secure else None) as port:
        arguments = (f"127.0.0.1:{port}", str(PROTO), *([str(authority.ca)] if secure else []))
        said = await asyncio.to_thread(node_program, CASES, *arguments, needs=NEEDS)
    assert int(said) == 15


def test_a_router_is_known_by_reflection_alone_under_both_of_its_names(serving: Cluster) -> None:
    said = node_program(
        """
        import grpc from "@grpc/grpc-js";
        import reflection from "grpc-js-reflection-client";

        for (const version of ["v1alpha", "v1"]) {
          const server = new reflection.GrpcReflection(process.argv[2], grpc.credentials.createInsecure(), {}, version);
          const found = await server.getDescriptorBySymbol("inference.GRPCInferenceService");
          const { inference } = found.getPackageObject({ keepCase: true });
          const client = new inference.GRPCInferenceService(process.argv[2], grpc.credentials.createInsecure());
          const answer = await new Promise((done, fail) =>
            client.ModelReady({ name: "tandem-nano" }, (error, answer) => (error ? fail(error) : done(answer))),
          );
          console.log(answer.ready);
        }
        """,
        serving.address,
        needs=NEEDS,
    )
    assert said.split() == ["true", "true"]
