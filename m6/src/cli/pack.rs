//! `m6 data pack`.

use std::path::{Path, PathBuf};

use m6::Result;
use m6::generate::perplexities;
use m6::model::Model;
use m6_data::{CaptionField, CaptionFields, Filter, LeftOut, PackReport, Scorer, ShardWriter, pack};
use m6_run::{Task, fetching};
use m6_runtime::device::device;

use super::args::{MIB, SHARD_MIB, cores, parse_field};
use super::output::{self, NAMED};

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  m6 data pack pictures/ shards/ --prefix train\n  \
    m6 data pack 'shards/*.tar' clean/ --filter min_side:64 --filter distinct:alike --field json:en \\\n    \
    --filter text_length:5..200 --dropped dropped.jsonl\n\n\
    In a folder, `cat.txt` and `cat.json` belong to `cat.png`. A line of a jsonl is {\"image\": PATH, ...}; its other \
    keys become the sample's JSON, a text alone where it has no image. A .txt has a text a line. Samples of shards keep all their members.\n\n\
    Rules for --filter, asked in their order; a limit of MIN..MAX may be left out:\n  \
      min_side:N, max_side:N     pixels of the short and of the long side of the picture\n  \
      aspect:MIN..MAX            width / height\n  \
      distinct:pictures          no earlier picture of the same bytes\n  \
      distinct:alike[,K]         no earlier picture whose 64-bit difference hash is equal, or at most K bits apart; \
                                 plain pictures all look alike\n  \
      distinct:texts             no earlier text that is the same, in the same field\n  \
      text_length:MIN..MAX       Unicode characters\n  \
      text_words:MIN..MAX        words between white space, of Latin texts; others pass\n  \
      script:han|latin|other     one script or several\n  \
      repetition:MAX             share of characters in the most frequent pair of words (Gopher's top 2-gram)\n  \
      symbols:MAX                share of characters that are no letters, digits, marks or white space\n  \
      words_absent:FILE          none of these words and phrases, one a line, in either case\n  \
      perplexity:MIN..MAX        e to the mean cost of a token, in nats, by the language model of --model\n\n\
    A picture that fails leaves its sample out. A text that fails is removed, with its key of the JSON, and the sample is \
    left out when no text stays. Samples without a picture pass the rules for pictures, those without a text those for \
    texts. Earlier are samples that were not left out.")]
pub struct PackArgs {
    /// A folder of pictures, sub-folders included; a jsonl file; or shards, as a glob or list that ends in .tar, .tar.gz,
    /// .tgz or .txt
    source: PathBuf,
    /// Folder for the shards
    out: PathBuf,
    /// Beginning of the shards' names
    #[arg(long, default_value = "data")]
    prefix: String,
    /// Size of a shard in MiB
    #[arg(long, value_name = "MIB", default_value_t = SHARD_MIB, value_parser = clap::value_parser!(u64).range(1..1 << 20))]
    shard_size: u64,
    /// Leave out what breaks this rule; may be given many times
    #[arg(long = "filter", value_name = "RULE")]
    rules: Vec<String>,
    /// A field whose texts the rules judge, `txt` or a key as in `json:en`; may be given many times. The default is every
    /// text of txt and json
    #[arg(long = "field", value_name = "MEMBER[:KEY]", value_parser = parse_field, requires = "rules")]
    fields: Vec<CaptionField>,
    /// Folder of the model that measures perplexity
    #[arg(long, value_name = "DIR", requires = "rules")]
    model: Option<PathBuf>,
    /// Where that model computes: `cpu`, `cuda:N`, or `auto`
    #[arg(long, default_value = "auto", requires = "model")]
    device: String,
    /// Write a line of JSON for each sample and each text that a rule left out: its key, the rule and the value
    #[arg(long, value_name = "FILE", requires = "rules")]
    dropped: Option<PathBuf>,
    /// Print the report as one line of JSON
    #[arg(long)]
    json: bool,
}

impl PackArgs {
    pub fn run(self) -> Result<()> {
        let scorer = self.model.as_deref().map(|dir| scorer(dir, &self.device)).transpose()?;
        let mut filter = Filter::new(&self.rules, &CaptionFields::new(self.fields)?, scorer)?;
        output::check_writable(&self.out.join(&self.prefix))?;
        if let Some(path) = &self.dropped {
            output::check_writable(path)?;
            filter = filter.log_to(path)?;
        }
        let writer = ShardWriter::create(&self.out, &self.prefix, self.shard_size * MIB)?;
        let mut task = None;
        let report = pack(&self.source, writer, filter, cores(), fetching(), |_, all| {
            task.get_or_insert_with(|| Task::new("pack", all as u64, "samples")).advance(1);
        })?;
        task.map(Task::finish);
        for warning in &report.warnings {
            eprintln!("{warning}");
        }
        for skipped in report.skipped.iter().take(NAMED) {
            eprintln!("skipped {skipped}");
        }
        if report.skipped.len() > NAMED {
            eprintln!("skipped {} more", report.skipped.len() - NAMED);
        }
        if self.json {
            return output::json(&report);
        }
        for shard in &report.shards {
            output::line(shard.display())?;
        }
        for LeftOut { rule, samples, texts } in &report.filtered {
            output::line(format_args!("{rule} left out {samples} samples, {texts} texts"))?;
        }
        let PackReport { samples, shards, without_text, without_picture, skipped, .. } = &report;
        output::line(format_args!(
            "{samples} samples in {} shards, {without_text} of them without a text, {without_picture} without a picture, \
             {} skipped",
            shards.len(),
            skipped.len()
        ))
    }
}

/// Measures texts by the model in `dir`.
fn scorer(dir: &Path, device_name: &str) -> Result<Scorer> {
    let model = Model::load(dir, device(device_name)?)?;
    Ok(Scorer::new(move |texts| perplexities(&model, texts).map_err(|error| error.to_string())))
}
