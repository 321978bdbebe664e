package main

import (
	"bytes"
	"errors"
	"image/color"
	"math"
	"slices"
	"strconv"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// colors are Okabe and Ito's, which people with any colour vision tell apart.
var colors = []color.Color{
	color.RGBA{0x00, 0x72, 0xb2, 0xff}, color.RGBA{0xe6, 0x9f, 0x00, 0xff}, color.RGBA{0x00, 0x9e, 0x73, 0xff}, color.RGBA{0xd5, 0x5e, 0x00, 0xff},
	color.RGBA{0x56, 0xb4, 0xe9, 0xff}, color.RGBA{0xcc, 0x79, 0xa7, 0xff}, color.RGBA{0xf0, 0xe4, 0x42, 0xff}, color.RGBA{0x99, 0x99, 0x99, 0xff},
}

const plotWidth = 28 * vg.Centimeter

// drawPlot makes the plot of a section as SVG: a group of bars for each row, a bar
// for each subject, with a line from the least to the most that was measured.
func drawPlot(s Section, rows []*Result) ([]byte, error) {
	p := plot.New()
	p.Title.Text = s.Title
	p.Y.Label.Text = rows[0].Unit
	if s.Ratios {
		p.Y.Label.Text = "ratio"
	}
	p.Y.Min = 0
	// Texts of the legend go to the right, where a wider font than the plotter's has room.
	p.Legend.Top, p.Legend.Left, p.Legend.XOffs = true, true, plotWidth*7/10
	var names, subjects []string
	most := 1 // subjects of a row
	for _, row := range rows {
		names = append(names, inLines(row.Name))
		most = max(most, len(row.Subjects))
	}
	p.NominalX(names...)

	width := plotWidth * 8 / 10 / vg.Length(len(rows)*(most+1))
	for at, row := range rows {
		for i, series := range row.Subjects {
			v := series.Values
			if s.Ratios {
				v = nil
				if against := row.series(row.Against); against != nil {
					v = ratios(series, against)
				}
			}
			f, ok := figure(v)
			if !ok {
				continue
			}
			color := slices.Index(subjects, series.Name)
			known := color >= 0
			if !known {
				color = len(subjects)
				subjects = append(subjects, series.Name)
			}
			offset := width * vg.Length(float64(i)-float64(len(row.Subjects)-1)/2)
			bar, err := plotter.NewBarChart(plotter.Values{f.Median}, width)
			if err != nil {
				return nil, err
			}
			bar.XMin, bar.Offset, bar.LineStyle.Width, bar.Color = float64(at), offset, 0, colors[color%len(colors)]
			p.Add(bar)
			if !known {
				p.Legend.Add(series.Name, bar)
			}
			if f.Least == f.Most {
				continue
			}
			spread, err := plotter.NewYErrorBars(struct {
				plotter.XYs
				plotter.YErrors
			}{
				plotter.XYs{{X: float64(at), Y: f.Median}},
				plotter.YErrors{{Low: f.Median - f.Least, High: f.Most - f.Median}},
			})
			if err != nil {
				return nil, err
			}
			p.Add(shifted{spread, offset})
		}
	}
	p.X.Min, p.X.Max = -0.5, float64(len(rows))-0.5
	if p.Y.Max <= p.Y.Min || math.IsInf(p.Y.Max, 0) {
		return nil, errors.New("section " + s.Key + " has nothing to plot")
	}
	p.Y.Max *= 1.4 // room for the legend
	p.Y.Tick.Marker = plot.TickerFunc(ticks)
	canvas := vgsvg.New(plotWidth, plotWidth*3/7)
	p.Draw(draw.New(canvas))
	var b bytes.Buffer
	_, err := canvas.WriteTo(&b)
	return b.Bytes(), err
}

// inLines breaks a name that is too long to stand beside its neighbours.
func inLines(name string) string {
	switch {
	case len(name) <= 12:
		return name
	case strings.Contains(name, ", "):
		return strings.Replace(name, ", ", ",\n", 1)
	default:
		return strings.Replace(name, " ", "\n", 1)
	}
}

// ticks are at most ten, at round numbers.
func ticks(least, most float64) (marks []plot.Tick) {
	step := math.Pow(10, math.Floor(math.Log10(most-least)))
	for _, part := range []float64{10, 5, 2} {
		if (most-least)*part/step <= 10 {
			step /= part
			break
		}
	}
	for v := least; v <= most; v += step {
		marks = append(marks, plot.Tick{Value: v, Label: strconv.FormatFloat(v, 'g', 3, 64)})
	}
	return marks
}

// shifted are error bars beside their place, where the bar of a group stands.
type shifted struct {
	*plotter.YErrorBars
	by vg.Length
}

func (s shifted) Plot(c draw.Canvas, p *plot.Plot) {
	c.Push()
	defer c.Pop()
	c.Translate(vg.Point{X: s.by})
	s.YErrorBars.Plot(c, p)
}
