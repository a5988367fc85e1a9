//! Compiles the C++ shim against the libtorch that `tch` links.

use std::path::Path;

include!("../build-support/link.rs");

fn main() {
    link_libtorch();
    let lib = libtorch_lib();
    let include = Path::new(&lib).join("../include");
    println!("cargo:rerun-if-changed=csrc/shim.cpp");
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .flag_if_supported("-Wno-unused-parameter")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .file("csrc/shim.cpp")
        .compile("m6_runtime_shim");
}
