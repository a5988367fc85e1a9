//! Where the bytes of a shard come from: a file, a url, or a command that writes them.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;

use crate::error::{DataError, Result};
#[cfg(feature = "remote")]
use crate::remote;

/// Beginning of a pattern whose rest is a shell command, as in webdataset.
const PIPE: &str = "pipe:";
const SCHEMES: [&str; 4] = ["http", "https", "s3", "gs"];
/// Bytes that are read from a command at a time.
const CHUNK: usize = 1 << 16;
/// Bytes of the end of what a command says that are looked at for its last line.
const LAST_WORDS: usize = 1 << 12;

/// A shard as the user named it.
#[derive(Debug)]
pub(crate) enum Source {
    /// A file that is read in place.
    File(PathBuf),
    /// One that is read from its file in the cache.
    Far(Far),
}

/// A shard that is no file.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Far {
    /// An address, its scheme one of [`SCHEMES`].
    #[cfg(feature = "remote")]
    Url(String),
    /// `pipe:COMMAND`.
    Pipe(String),
}

/// Takes the bytes of a shard as they come.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;

impl Source {
    /// The shard in the user's words.
    pub(crate) fn name(&self) -> PathBuf {
        match self {
            Self::File(path) => path.clone(),
            Self::Far(far) => far.name().into(),
        }
    }
}

impl Far {
    /// What a pattern without braces names, `None` for files and globs.
    ///
    /// # Errors
    /// Why a url cannot be read.
    pub(crate) fn parse(pattern: &str) -> std::result::Result<Option<Self>, String> {
        if pattern.starts_with(PIPE) {
            return Ok(Some(Self::Pipe(pattern.to_owned())));
        }
        match pattern.split_once("://") {
            Some((scheme, _)) if SCHEMES.contains(&scheme) => Self::url(pattern).map(Some),
            _ => Ok(None),
        }
    }

    #[cfg(feature = "remote")]
    fn url(url: &str) -> std::result::Result<Self, String> {
        if url.contains('*') {
            return Err("a url is no glob; name its shards with a list like {000..017}".to_owned());
        }
        let parts = url.split_once("://").and_then(|(_, rest)| rest.split_once('/'));
        if parts.is_none_or(|(place, path)| place.is_empty() || path.is_empty()) {
            return Err("expected a url like https://HOST/PATH or s3://BUCKET/PATH".to_owned());
        }
        Ok(Self::Url(url.to_owned()))
    }

    #[cfg(not(feature = "remote"))]
    fn url(_: &str) -> std::result::Result<Self, String> {
        Err("this program was built without urls; build it with `--features remote`".to_owned())
    }

    /// The url, or the command with its `pipe:`.
    pub(crate) fn name(&self) -> &str {
        match self {
            #[cfg(feature = "remote")]
            Self::Url(url) => url,
            Self::Pipe(pipe) => pipe,
        }
    }

    /// Hands all bytes of the shard to `sink`.
    ///
    /// # Errors
    /// Those of `sink`, or why the bytes did not come whole.
    pub(crate) fn stream(&self, sink: Sink) -> Result<()> {
        match self {
            #[cfg(feature = "remote")]
            Self::Url(url) => remote::download(url, sink),
            Self::Pipe(pipe) => run(pipe, sink),
        }
    }
}

/// Runs the shell command of `pipe` and hands what it writes to `sink`.
fn run(pipe: &str, sink: Sink) -> Result<()> {
    let fail = |reason: String| DataError::fetch(pipe, reason);
    let failed = |error: std::io::Error| fail(error.to_string());
    let mut child = Command::new("sh")
        .arg("-c")
        .arg(pipe.strip_prefix(PIPE).unwrap_or(pipe))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    // A command waits until what it says is read as well.
    let (copied, said) = thread::scope(|scope| {
        let said = scope.spawn(|| err.map(last_line));
        let copied = out.map_or(Ok(()), |out| copy(out, sink, failed));
        if copied.is_err() {
            // It may have ended by itself.
            let _ = child.kill();
        }
        (copied, said.join().ok().flatten().unwrap_or_default())
    });
    let status = child.wait().map_err(failed)?;
    copied?;
    if !status.success() {
        let said = if said.is_empty() { "it said nothing".to_owned() } else { format!("it said {said:?}") };
        return Err(fail(format!("the command ended with {status}; {said}")));
    }
    Ok(())
}

fn copy(mut from: impl Read, sink: Sink, failed: impl Fn(std::io::Error) -> DataError) -> Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        match from.read(&mut chunk).map_err(&failed)? {
            0 => return Ok(()),
            read => sink(&chunk[..read])?,
        }
    }
}

/// The last line that is not blank.
fn last_line(mut from: impl Read) -> String {
    let mut end = Vec::new();
    let mut chunk = [0; LAST_WORDS];
    while let Ok(read @ 1..) = from.read(&mut chunk) {
        end.extend_from_slice(&chunk[..read]);
        end.drain(..end.len().saturating_sub(LAST_WORDS));
    }
    let text = String::from_utf8_lossy(&end);
    text.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(command: &str) -> Result<String> {
        let mut bytes = Vec::new();
        let pipe = Far::parse(&format!("pipe:{command}")).unwrap().unwrap();
        pipe.stream(&mut |chunk| {
            bytes.extend_from_slice(chunk);
            Ok(())
        })?;
        Ok(String::from_utf8(bytes).unwrap())
    }

    #[test]
    fn a_command_gives_its_bytes_or_why_it_does_not() {
        assert_eq!(output("printf 'a b' | tr b c").unwrap(), "a c");
        let error = |command| output(command).unwrap_err().to_string();
        assert_eq!(
            error("echo half; echo one >&2; echo ' two ' >&2; echo >&2; exit 3"),
            "cannot fetch pipe:echo half; echo one >&2; echo ' two ' >&2; echo >&2; exit 3: \
             the command ended with exit status: 3; it said \"two\""
        );
        assert!(error("kill -9 $$").ends_with("ended with signal: 9 (SIGKILL); it said nothing"));
    }

    #[test]
    fn a_command_that_says_much_or_is_not_heard_to_its_end_is_no_hang() {
        assert_eq!(output("yes no | head -c 1000000 >&2; echo yes").unwrap(), "yes\n");
        let mut left = 3;
        let stopped = Far::Pipe("pipe:yes | cat".to_owned()).stream(&mut |_| {
            left -= 1;
            if left == 0 { Err(DataError::Cache("full".to_owned())) } else { Ok(()) }
        });
        assert_eq!(stopped.unwrap_err().to_string(), "cache of shards: full");
    }

    #[test]
    fn only_known_schemes_are_urls() {
        for file in ["train-000.tar", "/a/pipe:b", "ftp://host/a.tar", "s3:a"] {
            assert_eq!(Far::parse(file).unwrap(), None);
        }
        for url in ["http://host/a.tar", "https://host/a.tar?b=c", "s3://bucket/a", "gs://bucket/a"] {
            match Far::parse(url) {
                Ok(far) => assert_eq!(far.unwrap().name(), url),
                Err(reason) => assert!(reason.contains("--features remote"), "{reason}"),
            }
        }
    }

    #[test]
    #[cfg(feature = "remote")]
    fn a_url_names_one_shard() {
        for url in ["s3:///a.tar", "gs://bucket", "gs://bucket/", "http:///"] {
            assert!(Far::parse(url).unwrap_err().starts_with("expected a url like "), "{url}");
        }
        assert!(Far::parse("s3://bucket/*.tar").unwrap_err().contains("is no glob"));
    }
}
