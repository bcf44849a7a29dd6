// SPDX-License-Identifier: MIT OR Apache-2.0
//! The ckpt command.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod exit_code;
mod report;
mod supervisor;

use std::process;

use clap::Parser as _;

use args::{Cli, Command};
use exit_code::ExitCode;
use report::Report;

fn main() -> process::ExitCode {
    // Before anything else: init must find its descriptors as they were handed over.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == ckpt_job::INIT_ARGUMENT) {
        commands::init::run();
    }
    if std::env::args_os().nth(1).is_some_and(|argument| argument == commands::supervise::SUPERVISE_ARGUMENT)
    {
        return supervisor::main();
    }
    let cli = Cli::parse();
    let report = Report::new(cli.quiet);
    let (result, fallback) = match &cli.command {
        Command::Run(args) => (commands::run::run(args, &report), ExitCode::OWN_FAILURE),
        Command::Dump(args) => (commands::dump::run(args, &report), ExitCode::FAILURE),
        Command::Restore(args) => (commands::restore::run(args, &report), ExitCode::OWN_FAILURE),
        Command::Ps(args) => (commands::ps::run(args, &report), ExitCode::FAILURE),
        Command::List(args) => (commands::list::run(args, &report), ExitCode::FAILURE),
        Command::Inspect(args) => (commands::inspect::run(args, &report), ExitCode::FAILURE),
        Command::Verify(args) => (commands::verify::run(args, &report), ExitCode::FAILURE),
        Command::Kill(args) => (commands::kill::run(args), ExitCode::FAILURE),
        Command::Wait(args) => (commands::wait::run(args), ExitCode::OWN_FAILURE),
        Command::Supervise(args) => (commands::supervise::run(args, &report), ExitCode::FAILURE),
        Command::Attach(args) => (commands::attach::run(args, &report), ExitCode::OWN_FAILURE),
        Command::Rm(args) => (commands::rm::run(args, &report), ExitCode::FAILURE),
        Command::Squash(args) => (commands::squash::run(args, &report), ExitCode::FAILURE),
        Command::Check(args) => (commands::check::run(args, &report), ExitCode::FAILURE),
        Command::Doctor(args) => (commands::doctor::run(args, &report), ExitCode::FAILURE),
    };
    let code = result.unwrap_or_else(|error| {
        report.note(&report::chain(&error));
        ExitCode::of_error(&error, fallback)
    });
    code.into()
}
