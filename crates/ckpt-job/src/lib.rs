// SPDX-License-Identifier: MIT OR Apache-2.0
//! A job: its namespaces, its init, its registry entry and its terminal.
