//! Compiles the device plugin's messages without a system `protoc`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(["deviceplugin.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .build_transport(false)
        .generate_default_stubs(true)
        .disable_comments(["."])
        .emit_rerun_if_changed(false)
        .compile_fds(files)?;
    Ok(())
}
