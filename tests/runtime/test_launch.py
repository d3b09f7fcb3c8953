"""Launches that are refused, and what must be the same for all processes of one."""

import sys
from argparse import Namespace

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
