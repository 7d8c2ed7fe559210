//! Compiles the gRPC messages without a system `protoc`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(["inference.proto", "health.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .build_transport(false)
        .generate_default_stubs(true)
        .bytes(".")
        .disable_comments(["."])
        .emit_rerun_if_changed(false)
        .compile_fds(files)?;
    Ok(())
}
