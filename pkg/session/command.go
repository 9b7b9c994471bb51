package session

import "strings"

// CommandLevel says how much of a command line operators see. Arguments often contain secrets (kubernetes#97795).
type CommandLevel string

// The levels: nothing, only the program's name, everything.
const (
	CommandNone CommandLevel = "none"
	CommandArg0 CommandLevel = "argv0"
	CommandFull CommandLevel = "full"
)

// maxVisibleCommand bounds what CommandFull shows, in bytes. A command line may have 2 MiB.
const maxVisibleCommand = 16 << 10

// Visible returns the part of a command line that may be shown. cut says that CommandFull had to omit some of it.
func (l CommandLevel) Visible(args []string) (visible []string, cut bool) {
	if len(args) == 0 {
		return nil, false
	}
	switch l {
	case CommandFull:
	case CommandArg0:
		args = args[:1]
	default:
		return nil, false
	}
	room := maxVisibleCommand
	for _, arg := range args {
		if len(arg) > room {
			return append(visible, strings.ToValidUTF8(arg[:room], "")), true
		}
		visible = append(visible, arg)
		room -= len(arg)
	}
	return visible, false
}
