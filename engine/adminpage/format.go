package adminpage

import (
	"cmp"
	"fmt"
	"html/template"
	"slices"
	"strconv"
	"time"
)

// functions write figures for people.
var functions = template.FuncMap{
	"count": count, "size": size, "span": span, "rate": rate, "sizeRate": sizeRate, "amount": amount,
	"ends": ends, "percent": percent, "full": full, "half": func(n int64) int64 { return n / 2 },
	"most": func(n int64) int64 { return n / 10 * 9 }, "seconds": seconds, "clock": clock,
}

// count groups the digits of a number by three.
func count(n int64) string {
	s := strconv.FormatInt(n, 10)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// size is a number of bytes.
func size(n int64) string {
	v, unit := float64(n), 0
	for v >= 1024 && unit < len(units)-1 {
		v, unit = v/1024, unit+1
	}
	if unit == 0 || v >= 100 {
		return fmt.Sprintf("%.0f %s", v, units[unit])
	}
	return fmt.Sprintf("%.1f %s", v, units[unit])
}

var units = [...]string{"B", "KiB", "MiB", "GiB", "TiB"}

// amount is so many of a unit.
func amount(n int64, unit string) string {
	if unit == "bytes" {
		return size(n)
	}
	return count(n)
}

// span is how long it is from one time to another, both in Unix ms, in its two largest units.
func span(from, to int64) string {
	d := max(0, time.Duration(to-from)*time.Millisecond)
	days, hours := int(d.Hours())/24, int(d.Hours())%24
	minutes, seconds := int(d.Minutes())%60, int(d.Seconds())%60
	switch {
	case days > 0:
		return fmt.Sprintf("%d d %d h", days, hours)
	case hours > 0:
		return fmt.Sprintf("%d h %d min", hours, minutes)
	case minutes > 0:
		return fmt.Sprintf("%d min %d s", minutes, seconds)
	}
	return fmt.Sprintf("%d s", seconds)
}

// rate is how many per second n in so many ms are.
func rate(n, ms int64) string {
	perSecond := float64(n) * 1000 / float64(max(ms, 1))
	if perSecond >= 100 {
		return count(int64(perSecond + 0.5))
	}
	return strconv.FormatFloat(perSecond, 'f', 1, 64)
}

// seconds is so many ms.
func seconds(ms int64) string { return strconv.FormatFloat(float64(ms)/1000, 'f', 1, 64) }

// clock is a time in Unix ms.
func clock(ms int64) string { return time.UnixMilli(ms).UTC().Format("2006-01-02 15:04:05 UTC") }

func sizeRate(n, ms int64) string { return size(n * 1000 / max(ms, 1)) }

// end is one way in which things ended.
type end struct {
	Name  string
	Count int64
}

// ends lists those that occurred, the most frequent first.
func ends(byName map[string]int64) []end {
	var list []end
	for name, n := range byName {
		if n != 0 {
			list = append(list, end{name, n})
		}
	}
	slices.SortFunc(list, func(a, b end) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Name, b.Name))
	})
	return list
}

// percent is what part of all n is.
func percent(n, all int64) string {
	if n == 0 || all == 0 {
		return ""
	}
	p := 100 * float64(n) / float64(all)
	switch {
	case p < 0.1:
		return "< 0.1 %"
	case p < 100 && p > 99.9:
		return "> 99.9 %"
	}
	return strconv.FormatFloat(p, 'f', 1, 64) + " %"
}

// full tells how full a queue is: ok, high from a half on, or full from nine tenths on.
func full(depth, bound int64) string {
	switch {
	case bound == 0 || depth*2 < bound:
		return "ok"
	case depth*10 < bound*9:
		return "high"
	}
	return "full"
}
