//! Where the bytes of a shard come from: a file, compressed or not, a url, or a command that writes them.

use std::fs;
use std::path::PathBuf;

use crate::compressed::{self, Inflater};
use crate::error::Result;
use crate::lines::Lines;
use crate::pipe;
#[cfg(feature = "remote")]
use crate::remote;
use crate::sink::Sink;

/// Beginning of a pattern whose rest is a shell command, as in webdataset.
const PIPE: &str = "pipe:";
const SCHEMES: [&str; 4] = ["http", "https", "s3", "gs"];

/// A shard as the user named it.
#[derive(Debug)]
pub(crate) enum Source {
    /// A file that is read in place.
    File(PathBuf),
    /// One that is read from a file in the cache.
    Far(Far),
}

/// A shard that is no file, or none that can be read in place.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Far {
    /// An address, its scheme one of [`SCHEMES`].
    #[cfg(feature = "remote")]
    Url(String),
    /// `pipe:COMMAND`.
    Pipe(String),
    /// The path of a compressed file, which cannot be read at random places.
    Compressed(String),
}

impl Source {
    /// A file that is there.
    pub(crate) fn of_file(path: PathBuf) -> Self {
        match path.to_str() {
            Some(name) if compressed::is_compressed(&path) => Self::Far(Far::Compressed(name.to_owned())),
            _ => Self::File(path),
        }
    }

    /// What it holds if it is no archive, by its name; a command always writes an archive.
    pub(crate) fn lines(&self) -> Option<Lines<'_>> {
        match self {
            Self::File(path) => path.to_str().and_then(Lines::of_file),
            #[cfg(feature = "remote")]
            Self::Far(Far::Url(url)) => url.split('?').next().and_then(Lines::of_file),
            Self::Far(Far::Pipe(_)) => None,
            Self::Far(Far::Compressed(path)) => Lines::of_file(path),
        }
    }

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

    /// The url, the command with its `pipe:`, or the path.
    pub(crate) fn name(&self) -> &str {
        match self {
            #[cfg(feature = "remote")]
            Self::Url(url) => url,
            Self::Pipe(pipe) => pipe,
            Self::Compressed(path) => path,
        }
    }

    /// What tells it from all others: the name, and of a file where it is and which one it is.
    pub(crate) fn identity(&self) -> String {
        let Self::Compressed(name) = self else { return self.name().to_owned() };
        let path = fs::canonicalize(name).unwrap_or_else(|_| name.into());
        let stamp = fs::metadata(name).and_then(|metadata| Ok((metadata.len(), metadata.modified()?)));
        // Where there is none it cannot be read either, which is told then.
        format!("{path:?} {:?}", stamp.ok())
    }

    /// Hands all bytes of the shard to `sink`.
    ///
    /// # Errors
    /// Those of `sink`, or why the bytes did not come whole.
    pub(crate) fn stream(&self, sink: Sink) -> Result<()> {
        match self {
            #[cfg(feature = "remote")]
            Self::Url(url) => {
                let mut inflater = Inflater::new(url, sink);
                remote::download(url, &mut |bytes| inflater.push(bytes))?;
                inflater.finish()
            }
            Self::Pipe(pipe) => {
                let mut inflater = Inflater::new(pipe, sink);
                let command = pipe.strip_prefix(PIPE).unwrap_or(pipe);
                pipe::run(pipe, command, &mut |bytes| inflater.push(bytes))?;
                inflater.finish()
            }
            Self::Compressed(path) => compressed::read(path, sink),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_texts() {
        let text = |far: Far| Source::Far(far).lines().is_some();
        assert!(text(Far::Compressed("a/words.txt.gz".to_owned())));
        assert!(!text(Far::Compressed("a.tar.gz".to_owned())));
        assert!(!text(Far::Pipe("pipe:cat words.txt".to_owned())));
        #[cfg(feature = "remote")]
        assert!(text(Far::Url("https://host/words.jsonl?signature=a.tar".to_owned())));
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
