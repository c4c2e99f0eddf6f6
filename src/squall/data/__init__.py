"""Trajectories: in files and in memory, parts of them, one-step pairs, normalization."""

from squall._process.extras import explain_missing_extra

with explain_missing_extra():
    from squall.data.conditions import Condition as Condition
    from squall.data.description import Description as Description
    from squall.data.description import describe as describe
    from squall.data.errors import DataError as DataError
    from squall.data.errors import MissingFileError as MissingFileError
    from squall.data.formats import ArrayFile as ArrayFile
    from squall.data.formats import Joint as Joint
    from squall.data.formats import open as open
    from squall.data.normalization import Normalization as Normalization
    from squall.data.periods import windows as windows
    from squall.data.reading import TrajectoryFile as TrajectoryFile
    from squall.data.source import InMemory as InMemory
    from squall.data.source import Source as Source
    from squall.data.source import Split as Split
    from squall.data.source import Subset as Subset
    from squall.data.source import Windows as Windows
    from squall.data.source import load as load
    from squall.data.source import split as split
    from squall.data.source import subset as subset
    from squall.data.summary import summary as summary
    from squall.data.transitions import Transitions as Transitions
    from squall.data.writing import Writer as Writer
    from squall.data.writing import convert as convert
    from squall.data.writing import create as create
    from squall.data.writing import write as write
