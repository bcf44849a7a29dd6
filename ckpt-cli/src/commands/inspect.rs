// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ckpt inspect`: what is in a checkpoint, as a person reads it.

use anyhow::{Context as _, Result};
use ckpt_engine::describe::{Description, describe};
use ckpt_engine::restore::read::Image;
use ckpt_image::store::Store;

use crate::args::InspectArgs;
use crate::commands::store_directory;
use crate::exit_code::ExitCode;
use crate::report::Report;

/// Runs the command.
pub fn run(args: &InspectArgs, report: &Report) -> Result<ExitCode> {
    let store = store_directory(&args.store)?;
    let spec = args.checkpoint.to_str().context("the checkpoint's name is not valid UTF-8")?;
    let path = Store::open(&store)?.resolve(spec)?;
    let image = Image::open(&path)?;
    let d = describe(&image)?;
    if args.json {
        report.print_json(&d)?;
    } else {
        report.print(&text(&d, &path));
    }
    Ok(ExitCode::SUCCESS)
}

fn text(d: &Description, path: &std::path::Path) -> String {
    let mut out = vec![format!("{}", path.display()), d.job.clone(), String::new(), "Processes".to_owned()];
    for root in d.processes.iter().filter(|p| !d.processes.iter().any(|q| q.pid == p.parent)) {
        tree(d, root.pid, 1, &mut out);
    }
    if d.images.len() > 1 {
        out.push(String::new());
        out.push("Images (incremental: the newest first, each built on the next)".to_owned());
        out.extend(d.images.iter().map(|i| {
            format!("  {}  {} KiB, of which {} KiB are in use", i.path, i.bytes / 1024, i.memory_bytes / 1024)
        }));
    }
    out.push(String::new());
    out.push("Memory".to_owned());
    for p in &d.processes {
        out.push(format!("  {:>7}  {:>9} KiB stored  {}", p.pid, p.stored_bytes / 1024, p.memory));
    }
    if !d.objects.is_empty() {
        out.push(String::new());
        out.push("Shared objects".to_owned());
        out.extend(d.objects.iter().map(|o| format!("  {o}")));
    }
    out.push(String::new());
    out.push("Descriptors".to_owned());
    for p in &d.processes {
        for f in &p.descriptors {
            out.push(format!("  {:>7} {:>4}  {}: {}", p.pid, f.number, f.kind, f.what));
        }
    }
    out.join("\n")
}

fn tree(d: &Description, pid: i32, depth: usize, out: &mut Vec<String>) {
    for p in d.processes.iter().filter(|p| p.pid == pid) {
        out.push(format!("{}{} {}", "  ".repeat(depth), p.pid, p.what));
        for c in d.processes.iter().filter(|c| c.parent == pid && c.pid != pid) {
            tree(d, c.pid, depth + 1, out);
        }
    }
}
