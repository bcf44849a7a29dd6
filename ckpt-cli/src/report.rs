// SPDX-License-Identifier: MIT OR Apache-2.0
//! Talking to the person at the terminal, or to a script.
//!
//! Messages go to stderr, results to stdout. Progress is one line that overwrites itself, on a terminal only: a pipe or a log
//! never sees it.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{self, IsTerminal as _, Write as _};

/// Where messages go and how much of them.
#[derive(Debug)]
pub struct Report {
    progress: bool,
    line_shown: Cell<bool>,
    /// Where messages go instead of stderr, which may belong to a job.
    instead: RefCell<Option<File>>,
}

impl Report {
    /// Progress is shown if stderr is a terminal and nobody asked for quiet.
    pub fn new(quiet: bool) -> Report {
        Report {
            progress: !quiet && io::stderr().is_terminal(),
            line_shown: Cell::new(false),
            instead: RefCell::default(),
        }
    }

    /// From now on messages go to `file`, and no progress is shown.
    pub fn divert(&self, file: File) {
        self.instead.replace(Some(file));
    }

    /// Shows how far things are, in place of what was shown before.
    pub fn progress(&self, text: &str) {
        if self.progress && self.instead.borrow().is_none() {
            // To the first column, the text, the rest of the line cleared.
            let _ = write!(io::stderr(), "\r{}\x1b[K", text.lines().next().unwrap_or_default());
            self.line_shown.set(true);
        }
    }

    /// Takes the progress line away.
    pub fn clear(&self) {
        if self.line_shown.replace(false) {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }

    /// A message that is always shown.
    pub fn note(&self, text: &str) {
        self.clear();
        if let Some(file) = self.instead.borrow_mut().as_mut() {
            let _ = writeln!(file, "{text}");
            return;
        }
        // With stderr gone there is nobody to tell, and that is no reason to fail.
        let _ = writeln!(io::stderr(), "ckpt: {text}");
    }

    /// Something that a person should look at.
    pub fn warning(&self, text: &str) {
        self.note(&format!("warning: {text}"));
    }

    /// A result, for people.
    pub fn print(&self, text: &str) {
        self.clear();
        let _ = writeln!(io::stdout(), "{text}");
    }

    /// A result, for scripts: one JSON document.
    pub fn print_json(&self, value: &impl serde::Serialize) -> anyhow::Result<()> {
        self.clear();
        let mut out = io::stdout().lock();
        serde_json::to_writer_pretty(&mut out, value)?;
        writeln!(out)?;
        Ok(())
    }
}

/// An error and its causes, each cause once: many messages hold the text of their cause already.
pub fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// A table for people: columns as wide as their widest cell, two spaces between them.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> =
            cells.zip(&widths).map(|(cell, width)| format!("{cell:<width$}", width = *width)).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(&mut header.iter().copied())];
    lines.extend(rows.iter().map(|row| line(&mut row.iter().map(String::as_str))));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    #[test]
    fn causes_are_said_once() {
        let cause = std::io::Error::from_raw_os_error(2);
        let error = anyhow::Error::new(cause)
            .context("opening x: No such file or directory (os error 2)")
            .context("y");
        assert_eq!(super::chain(&error), "y: opening x: No such file or directory (os error 2)");
    }

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["longer".to_owned(), "22".to_owned()]];
        assert_eq!(super::table(&["NAME", "N"], &rows), "NAME    N\na       1\nlonger  22");
    }
}
