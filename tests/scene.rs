//! A folder with data and configs, and `m6` running in it.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};

use m6_data::{Rgb8, ShardWriter};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Names and colours of the pictures, in English and Chinese.
const COLOURS: [(&str, &str, [u8; 3]); 4] = [
    ("red", "红", [220, 40, 40]),
    ("green", "绿", [40, 180, 60]),
    ("blue", "蓝", [40, 70, 220]),
    ("black", "黑", [20, 20, 20]),
];
/// Shapes as a share of the side: width and height of a rectangle in the middle.
const SHAPES: [(&str, &str, [f32; 2]); 3] =
    [("square", "方块", [0.6, 0.6]), ("bar", "横条", [1.0, 0.3]), ("pole", "竖条", [0.3, 1.0])];
const SIDE: u32 = 20;

/// A temporary folder in which `m6` runs.
pub struct Scene {
    dir: TempDir,
}

/// What a finished process left.
#[derive(Debug)]
pub struct Finished {
    /// The exit code; none after a signal.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Scene {
    /// Writes `train.toml`, `vqgan.toml` and, into `pictures/`, a PNG and a JSON for each colour and shape.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("train.toml"), include_str!("train.toml")).unwrap();
        fs::write(dir.path().join("vqgan.toml"), include_str!("vqgan.toml")).unwrap();
        fs::create_dir(dir.path().join("pictures")).unwrap();
        for sample in samples() {
            for (extension, bytes) in sample.members {
                fs::write(dir.path().join(format!("pictures/{}.{extension}", sample.key)), bytes).unwrap();
            }
        }
        Self { dir }
    }

    /// A scene with the shard `shards/train-000000.tar`.
    pub fn with_shard() -> Self {
        let scene = Self::new();
        scene.write_shard("shards", samples());
        scene
    }

    /// A scene with a shard and, in `tokenizer/model`, an image tokenizer with its first random weights.
    pub fn with_tokenizer() -> Self {
        let scene = Self::with_shard();
        let config = m6_run::config::load::<m6_vqgan::train::TrainConfig>(scene.path("vqgan.toml"), &[]);
        let params = m6_runtime::Params::new(tch::Device::Cpu, 5);
        let vqgan = m6_vqgan::Vqgan::new(&params, &config.unwrap().config.model);
        vqgan.save(&scene.path("tokenizer/model"), m6_vqgan::Dtype::Bfloat16).unwrap();
        scene
    }

    /// A scene with a shard, an image tokenizer and, in `run/model`, a model after two steps.
    pub fn with_model() -> Self {
        let scene = Self::with_tokenizer();
        scene.succeed(&["train", "train.toml", "--set", "schedule.steps=2"]);
        scene
    }

    /// A path inside the scene.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes samples as the shard `FOLDER/train-000000.tar`.
    pub fn write_shard(&self, folder: &str, samples: impl IntoIterator<Item = Sample>) {
        let mut writer = ShardWriter::create(&self.path(folder), "train", u64::MAX).unwrap();
        for Sample { key, members } in samples {
            let members: Vec<_> = members.iter().map(|(e, bytes)| (e.as_str(), bytes.as_slice())).collect();
            writer.write(&key, &members).unwrap();
        }
        writer.finish().unwrap();
    }

    /// The program, to be run in the scene.
    pub fn command(&self, args: &[impl AsRef<OsStr>]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_m6"));
        command.args(args);
        self.prepare(&mut command);
        command
    }

    /// The program, to be run by a shell after `setup`.
    pub fn command_after(&self, setup: &str, args: &[&str]) -> Command {
        let mut command = Command::new("sh");
        command
            .args(["-c", &format!("{setup}; exec \"$0\" \"$@\"")])
            .arg(env!("CARGO_BIN_EXE_m6"))
            .args(args);
        self.prepare(&mut command);
        command
    }

    fn prepare(&self, command: &mut Command) {
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        // Tests share the cores. One thread each keeps libtorch's from waiting for each other.
        command.env("OMP_NUM_THREADS", "1").env_remove("RUST_BACKTRACE");
    }

    /// Runs the program to its end.
    pub fn run(&self, args: &[impl AsRef<OsStr>]) -> Finished {
        finish(self.command(args))
    }

    /// Runs the program, which succeeds; returns its standard output.
    #[track_caller]
    pub fn succeed(&self, args: &[&str]) -> String {
        let finished = self.run(args);
        assert_eq!(finished.code, Some(0), "m6 {}\n{}", args.join(" "), finished.stderr);
        finished.stdout
    }

    /// Runs the program, which succeeds; every line of its standard output is a JSON object.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Vec<Value> {
        let stdout = self.succeed(args);
        let object = |line| serde_json::from_str(line).ok().filter(Value::is_object);
        let parsed = stdout.lines().map(|line| object(line).unwrap_or_else(|| panic!("not JSON: {line}")));
        parsed.collect()
    }

    /// Starts the program; its standard error can be waited for.
    pub fn start(&self, args: &[&str]) -> Running {
        let mut child = self.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Running { child, stderr, seen: String::new() }
    }
}

/// Runs a command to its end.
pub fn finish(mut command: Command) -> Finished {
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8 output");
    Finished { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// A process that has not ended yet; killed when dropped.
pub struct Running {
    child: Child,
    stderr: BufReader<ChildStderr>,
    seen: String,
}

impl Running {
    /// Waits for a line of standard error that `is_it`.
    #[track_caller]
    pub fn wait_for_line(&mut self, is_it: impl Fn(&str) -> bool) {
        loop {
            let start = self.seen.len();
            let read = self.stderr.read_line(&mut self.seen).unwrap();
            assert!(read > 0, "ended without the line that was waited for:\n{}", self.seen);
            if is_it(&self.seen[start..]) {
                return;
            }
        }
    }

    /// Waits until a file or folder is there.
    pub fn wait_for_path(&mut self, path: &Path) {
        while !path.exists() {
            assert!(self.child.try_wait().unwrap().is_none(), "ended without {}", path.display());
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    /// Ends it at once, as `kill -9` does.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
    }

    /// Sends a signal such as `INT`.
    pub fn signal(&self, name: &str) {
        let kill = format!("kill -{name} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    }

    /// Waits for the end.
    pub fn finish(mut self) -> Finished {
        let mut stdout = String::new();
        self.stderr.read_to_string(&mut self.seen).unwrap();
        self.child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
        Finished { code: self.child.wait().unwrap().code(), stdout, stderr: std::mem::take(&mut self.seen) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails where the process has ended, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Members of a shard that share a key, by extension.
pub struct Sample {
    pub key: String,
    pub members: Vec<(String, Vec<u8>)>,
}

/// A member of a sample: extension and content.
pub type Member<'a> = (&'a str, &'a [u8]);

impl Sample {
    pub fn new(key: &str, members: &[Member]) -> Self {
        let members = members.iter().map(|(e, bytes)| ((*e).to_owned(), bytes.to_vec())).collect();
        Self { key: key.to_owned(), members }
    }
}

/// A picture and its names for each colour and shape.
pub fn samples() -> Vec<Sample> {
    let mut samples = Vec::new();
    for (colour, colour_zh, rgb) in COLOURS {
        for (shape, shape_zh, size) in SHAPES {
            let (en, zh) = (format!("{colour} {shape}"), format!("{colour_zh}{shape_zh}"));
            let names = json!({ "en": en, "zh": zh, "style": "flat" }).to_string();
            let png = rectangle(rgb, size).encode_png().unwrap();
            samples.push(Sample::new(
                &format!("{colour}-{shape}"),
                &[("png", &png), ("json", names.as_bytes())],
            ));
        }
    }
    samples
}

/// A rectangle in the middle of a white picture; its sides are shares of the picture's.
fn rectangle(colour: [u8; 3], size: [f32; 2]) -> Rgb8 {
    let inside = |at: u32, share: f32| ((at as f32 + 0.5) / SIDE as f32 - 0.5).abs() <= share / 2.0;
    let mut picture = Rgb8::filled(SIDE, SIDE, [u8::MAX; 3]);
    for (i, pixel) in picture.pixels.chunks_exact_mut(3).enumerate() {
        let (x, y) = (i as u32 % SIDE, i as u32 / SIDE);
        if inside(x, size[0]) && inside(y, size[1]) {
            pixel.copy_from_slice(&colour);
        }
    }
    picture
}
