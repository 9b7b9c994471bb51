//go:build race

package spdy

const raceEnabled = true
