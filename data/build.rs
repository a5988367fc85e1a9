//! With the feature `turbojpeg`: compiles `csrc/jpeg_pairs.c` against the sources that libjpeg-turbo was built from, and
//! has it linked before that.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "turbojpeg")]
    turbojpeg::compile();
}

#[cfg(feature = "turbojpeg")]
mod turbojpeg {
    use std::path::Path;
    use std::{env, fs};

    const DECODER: &str = "csrc/jpeg_pairs.c";
    /// A line of CMake's cache: the folder of the sources.
    const SOURCES: &str = "CMAKE_HOME_DIRECTORY:INTERNAL=";

    pub fn compile() {
        println!("cargo:rerun-if-changed={DECODER}");
        // Nothing else of the folder is needed than that CMake's own, with headers that are installed nowhere, is beside it.
        let headers =
            env::var("DEP_TURBOJPEG_INCLUDE").expect("a libjpeg-turbo that turbojpeg-sys has built");
        let built = Path::new(&headers).with_file_name("build");
        let cache = fs::read_to_string(built.join("CMakeCache.txt")).expect("CMake's cache of libjpeg-turbo");
        let sources =
            cache.lines().find_map(|line| line.strip_prefix(SOURCES)).expect("libjpeg-turbo's sources");
        cc::Build::new()
            .file(DECODER)
            .include(Path::new(sources).join("src"))
            .include(built)
            .opt_level(3)
            .warnings(false)
            .cargo_metadata(false)
            .compile("jpeg_pairs");
        let out = env::var("OUT_DIR").expect("cargo's folder");
        println!("cargo:rustc-link-search=native={out}");
        // All of it, since nothing asks for it before the library does, which would take its own.
        println!("cargo:rustc-link-lib=static:+whole-archive=jpeg_pairs");
    }
}
