//! `m6 generate`.

use std::path::{Path, PathBuf};

use m6::Result;
use m6::generate::{DrawRequest, Drawing, Sampling, draw, rows_grid};
use m6::model::{Model, ModelInfo};
use m6_run::{Task, write_atomic};
use m6_runtime::device::device;
use serde::Serialize;

use super::output::{self, beside};

/// Draw pictures from prompts in English or Chinese
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  m6 generate --model models/emoji \"红心\" \"a red heart\" -n 9 --seed 1 -o out.png\n\n\
    Writes the grid out.png (a row for each prompt), the pictures out-000.png, out-001.png, ... and all settings in \
    out.json."
)]
pub struct Args {
    /// What to draw; an empty prompt draws anything
    #[arg(required = true)]
    prompts: Vec<String>,
    /// Model folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The grid to write; pictures and settings go beside it
    #[arg(short, long, value_name = "FILE", default_value = "out.png")]
    out: PathBuf,
    /// Pictures of each prompt
    #[arg(short = 'n', long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    count: u64,
    /// Draw this many for each picture and keep the one that the model itself finds to show the prompt best
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1_000))]
    best_of: u64,
    /// Drawing i of every prompt comes from seed SEED + i
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Below 1 for safer, above 1 for wilder pictures; 0 always takes the most likely code
    #[arg(long, default_value_t = Sampling::default().temperature, allow_negative_numbers = true)]
    temperature: f64,
    /// Choose among this many most likely codes; 0 for all
    #[arg(long, default_value_t = Sampling::default().top_k)]
    top_k: usize,
    /// Choose among the most likely codes of this much probability; 1 for all
    #[arg(long, default_value_t = Sampling::default().top_p, allow_negative_numbers = true)]
    top_p: f64,
    /// How closely to follow the prompt: 1 as in training, larger more closely
    #[arg(long, value_name = "SCALE", default_value_t = 3.0, allow_negative_numbers = true)]
    guidance: f64,
    /// Where to compute: `cpu`, `cuda:N`, or `auto`
    #[arg(long, default_value = "auto")]
    device: String,
    /// Print one line of JSON a picture
    #[arg(long)]
    json: bool,
}

/// How pictures were drawn.
#[derive(Debug, Clone, Copy, Serialize)]
struct Settings {
    #[serde(flatten)]
    sampling: Sampling,
    guidance: f64,
    best_of: u64,
}

/// A picture that was written.
#[derive(Debug, Clone, Serialize)]
struct Picture {
    file: PathBuf,
    prompt: String,
    seed: u64,
}

/// A line of `--json`.
#[derive(Debug, Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    picture: &'a Picture,
    #[serde(flatten)]
    settings: Settings,
}

/// The file beside the grid: what is needed to draw the same pictures again.
#[derive(Debug, Serialize)]
struct Sidecar<'a> {
    version: &'static str,
    model: &'a Path,
    tokenizer: &'a str,
    vqgan: &'a str,
    device: &'a str,
    #[serde(flatten)]
    settings: Settings,
    count: u64,
    seed: u64,
    grid: &'a Path,
    pictures: &'a [Picture],
}

impl Args {
    pub fn run(self) -> Result<()> {
        output::check_extension("--out", &self.out, "png")?;
        let request = self.request();
        request.validate()?;
        output::check_writable(&self.out)?;
        let model = Model::load(&self.model, device(&self.device)?)?;

        let pictures = request.prompts.len() as u64 * self.count;
        let mut task = Task::new(&format!("draw {pictures} pictures"), request.codes(&model), "codes");
        let drawings = draw(&model, &request, |chosen| task.advance(chosen))?;
        task.finish();

        let settings =
            Settings { sampling: request.sampling, guidance: request.guidance, best_of: self.best_of };
        let pictures = self.write(&drawings, settings, &model.info)?;
        if self.json {
            return pictures.iter().try_for_each(|picture| output::json(&Line { picture, settings }));
        }
        for picture in &pictures {
            output::line(format_args!("{}  {}", picture.file.display(), picture.prompt))?;
        }
        output::line(format_args!("{}  all of them", self.out.display()))?;
        output::line(format_args!("{}  their settings", beside(&self.out, ".json").display()))
    }

    fn request(&self) -> DrawRequest {
        DrawRequest {
            prompts: self.prompts.clone(),
            count: self.count as usize,
            best_of: self.best_of as usize,
            seed: self.seed,
            sampling: Sampling { temperature: self.temperature, top_k: self.top_k, top_p: self.top_p },
            guidance: self.guidance,
        }
    }

    /// Writes single pictures, the grid and the sidecar, which comes last and so names only files that are there.
    fn write(&self, drawings: &[Drawing], settings: Settings, info: &ModelInfo) -> Result<Vec<Picture>> {
        let write = |(i, drawing): (usize, &Drawing)| {
            let file = beside(&self.out, &format!("-{i:03}.png"));
            drawing.picture.save_png(&file)?;
            Ok(Picture { file, prompt: drawing.prompt.clone(), seed: drawing.seed })
        };
        let pictures = drawings.iter().enumerate().map(write).collect::<Result<Vec<_>>>()?;
        rows_grid(drawings, self.count as usize).save_png(&self.out)?;
        let sidecar = Sidecar {
            version: env!("CARGO_PKG_VERSION"),
            model: &self.model,
            tokenizer: &info.tokenizer,
            vqgan: &info.vqgan,
            device: &self.device,
            settings,
            count: self.count,
            seed: self.seed,
            grid: &self.out,
            pictures: &pictures,
        };
        let json = output::to_json(&sidecar, serde_json::to_string_pretty)?;
        write_atomic(beside(&self.out, ".json"), json.as_bytes())?;
        Ok(pictures)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::{Value, json};

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &str) -> std::result::Result<Args, clap::Error> {
        Command::try_parse_from(line.split(' ')).map(|command| command.args)
    }

    fn failure(line: &str) -> String {
        parse(line).unwrap().run().unwrap_err().to_string()
    }

    #[test]
    fn values_out_of_range_are_named_before_the_model_is_opened() {
        let line = |flags: &str| failure(&format!("m6 --model nowhere heart {flags}"));
        assert_eq!(line("--top-p 1.5"), "--top-p 1.5: expected above 0 and up to 1");
        assert_eq!(line("--guidance -2"), "--guidance -2: expected 0 or more");
        assert_eq!(line("-o heart.jpg"), "--out heart.jpg: expected a file name that ends in .png");
        assert!(parse("m6 --model nowhere heart -n 0").unwrap_err().to_string().contains("1..=10000"));
        assert!(parse("m6 --model nowhere").is_err());
    }

    #[test]
    fn a_missing_model_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out.png");
        let message =
            failure(&format!("m6 --model {}/none heart -o {}", dir.path().display(), out.display()));
        assert!(message.contains("/none: is not a folder"), "{message}");
    }

    #[test]
    fn pictures_grid_and_settings_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("new/out.png");
        output::check_writable(&out).unwrap();
        let args = parse(&format!("m6 --model m 红心 -n 2 --seed 5 --top-k 7 -o {}", out.display())).unwrap();
        let drawing = |seed| Drawing {
            prompt: "红心".into(),
            seed,
            codes: vec![1],
            picture: m6_data::Rgb8::filled(4, 4, [seed as u8; 3]),
        };
        let info = serde_json::from_value(json!({
            "model": {"width": 16, "layers": 1, "heads": 2, "hidden": 8, "max_text": 4,
                "patches": {"resolution": 16, "channels": [16]}},
            "vocab": {"text": 256, "codes": 8}, "code_grid": 1, "dtype": "bf16", "tokenizer": "t", "vqgan": "v",
        }))
        .unwrap();
        let settings = Settings { sampling: args.request().sampling, guidance: 3.0, best_of: 2 };
        let pictures = args.write(&[drawing(5), drawing(6)], settings, &info).unwrap();

        let name = |file: &str| dir.path().join("new").join(file);
        assert!(name("out-000.png").exists() && name("out-001.png").exists() && out.exists());
        let sidecar: Value = serde_json::from_slice(&std::fs::read(name("out.json")).unwrap()).unwrap();
        assert_eq!((&sidecar["top_k"], &sidecar["vqgan"]), (&json!(7), &json!("v")));
        assert_eq!(sidecar["pictures"][1]["seed"], 6);
        let line = serde_json::to_value(Line { picture: &pictures[0], settings }).unwrap();
        let file = name("out-000.png");
        assert_eq!(
            line,
            json!({"file": file, "prompt": "红心", "seed": 5, "temperature": 0.7, "top_k": 7, "top_p": 1.0,
                "guidance": 3.0, "best_of": 2})
        );
    }
}
