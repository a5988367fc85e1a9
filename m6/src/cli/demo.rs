//! `m6 demo`.

use std::path::PathBuf;

use m6::Result;
use m6::demo::{DemoRequest, demo};

use super::output;

/// Pretrain a tiny model from scratch, draw and caption with the shipped one, and show it all on a page
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  m6 demo --out out/demo\n\nTakes about five minutes on two cores.")]
pub struct Args {
    /// Folder of the page
    #[arg(long, value_name = "DIR", default_value = "out/demo")]
    out: PathBuf,
    /// Folder of the finished model
    #[arg(long, value_name = "DIR", default_value = "models/emoji")]
    model: PathBuf,
    /// Folder of the emoji shards
    #[arg(long, value_name = "DIR", default_value = "datasets/emoji")]
    data: PathBuf,
}

impl Args {
    pub fn run(self) -> Result<()> {
        output::check_writable(&self.out.join("index.html"))?;
        let page = demo(&DemoRequest { out: self.out, model: self.model, data: self.data })?;
        output::line(format_args!("{}  pictures, captions, curves and timings", page.display()))
    }
}
